"""The transducer's lattice: closed forms, enumeration with a second oracle, padding, number types, predictor and joiner."""
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from speechlearn.alignment.transducer import (
    SLICE, Decoder, Joiner, arc_posteriors, diagonals, lattice_log_prob, node_scores, plot_transducer_lattice, transducer_brute_force, transducer_loss,
)

GOLDEN = Path(__file__).parent / "golden" / "zipformer"


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(seed=0, n=4, n_steps=7, n_tokens=4, vocab=6, blank=2, dtype=torch.float64):
    """Logits and texts of different lengths; the first utterance fills the rectangle."""
    g = torch.Generator().manual_seed(seed)
    lengths, target_lengths = torch.randint(1, n_steps + 1, (n,), generator=g), torch.randint(0, n_tokens + 1, (n,), generator=g)
    lengths[0], target_lengths[0] = n_steps, n_tokens
    targets = (torch.randint(1, vocab, (n, n_tokens), generator=g) + blank) % vocab
    return noise(seed, n, n_steps, n_tokens + 1, vocab, dtype=dtype), targets, lengths, target_lengths


def inside(logits, lengths, target_lengths):
    """True at the nodes that belong to an utterance."""
    steps, rows = torch.arange(logits.shape[1]), torch.arange(logits.shape[2])
    return (steps < lengths[:, None])[:, :, None] & (rows <= target_lengths[:, None])[:, None]


def loss_and_gradient(logits, *args, **options):
    x = logits.detach().clone().requires_grad_()
    losses = transducer_loss(x, *args, **options)
    return losses.detach(), torch.autograd.grad((losses * torch.arange(1, len(losses) + 1)).sum(), x)[0]


def paths(n_steps, n_tokens):
    """For each path the step at which each symbol is written: all sequences that never fall."""
    return itertools.combinations_with_replacement(range(n_steps), n_tokens)


def path_log_prob(log_probs, text, blank, written_at):
    """Log-probability of one path: another way to walk than `transducer_brute_force` has."""
    total, u = 0.0, 0
    for t in range(len(log_probs)):
        while u < len(text) and written_at[u] == t:
            total, u = total + log_probs[t, u, text[u]], u + 1
        total = total + log_probs[t, u, blank]
    return total


# ---- values ---------------------------------------------------------------------------------------------------------


def test_the_oracle_counts_paths_and_adds_up_their_probabilities():
    for n_steps, n_tokens in itertools.product(range(1, 5), range(4)):
        ones = torch.zeros(n_steps, n_tokens + 1, 3, dtype=torch.float64)
        assert transducer_brute_force(ones, [1] * n_tokens, blank=0).exp().item() == pytest.approx(math.comb(n_steps - 1 + n_tokens, n_tokens))
        lp, text = noise(n_steps, n_steps, n_tokens + 1, 4).log_softmax(dim=-1), [1, 2, 0][:n_tokens]
        total = sum(math.exp(path_log_prob(lp, text, 3, p)) for p in paths(n_steps, n_tokens))
        assert transducer_brute_force(lp, text, blank=3).exp().item() == pytest.approx(total)


@pytest.mark.parametrize(("n_steps", "n_tokens", "vocab"), [(1, 0, 2), (1, 5, 3), (7, 0, 4), (SLICE, 3, 5), (200, 30, 50), (3000, 60, 7)])
def test_uniform_logits_have_a_closed_form(n_steps, n_tokens, vocab):
    """All paths have probability V^-(T+U), and there are C(T-1+U, U): also where that underflows 64 bits."""
    logits = torch.full((1, n_steps, n_tokens + 1, vocab), 3.0)
    loss = transducer_loss(logits, torch.ones(1, n_tokens, dtype=torch.long), tensor([n_steps]), tensor([n_tokens]), blank=0)
    truth = (n_steps + n_tokens) * math.log(vocab) - math.log(math.comb(n_steps - 1 + n_tokens, n_tokens))
    assert loss.item() == pytest.approx(truth, rel=1e-6)


def test_probabilities_of_all_texts_sum_to_one():
    """With one symbol there is one text of each length; the mass beyond 60 symbols is below 2^-50."""
    logits = noise(0, 1, 3, 62, 2)
    logits[..., 1] = -logits[..., 1].abs() - 1
    logits[..., 0] = logits[..., 0].abs()
    total = sum(math.exp(-transducer_loss(logits[:, :, : u + 1], torch.ones(1, u, dtype=torch.long), tensor([3]), tensor([u]), blank=0).item()) for u in range(61))
    assert total == pytest.approx(1, abs=1e-12)


def test_diagonals_and_node_scores_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    inf = math.inf
    assert diagonals(x)[:, 0].tolist() == [[1, -inf, -inf], [4, 2, -inf], [-inf, 5, 3], [-inf, -inf, 6]]
    symbol = torch.tensor([[[0.5, -inf], [0.1, -inf]]]).log().nan_to_num(nan=-inf)
    blank = torch.tensor([[[0.2, 0.3], [0.4, 0.6]]]).log()
    alpha = node_scores(symbol, blank).exp()[0]
    assert torch.allclose(alpha, torch.tensor([[1.0, 0.5], [0.2, 0.5 * 0.3 + 0.2 * 0.1]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))
def test_posteriors_are_the_shares_of_the_paths(seed, n_steps, n_tokens, more_steps, more_tokens):
    vocab, blank = 4, seed % 4
    text = [(blank + 1 + seed // 7**k) % vocab for k in range(n_tokens)]
    text = [k if k != blank else (blank + 1) % vocab for k in text]
    lp = noise(seed, n_steps + more_steps, n_tokens + more_tokens + 1, vocab).log_softmax(dim=-1)
    symbols = tensor([*text, *[0] * more_tokens])
    symbol = lp[:, :-1].gather(2, symbols.expand(len(lp), -1)[..., None])[..., 0]
    log_p, used_symbol, used_blank = arc_posteriors(symbol[None], lp[None, :, :, blank], tensor([n_steps]), tensor([n_tokens]))
    expected_symbol, expected_blank = torch.zeros_like(used_symbol[0]), torch.zeros_like(used_blank[0])
    for written_at in paths(n_steps, n_tokens):
        p = math.exp(path_log_prob(lp[:n_steps], text, blank, written_at) - log_p.item())
        for u, t in enumerate(written_at):
            expected_symbol[t, u] += p
        for t in range(n_steps):
            expected_blank[t, sum(w <= t for w in written_at)] += p
    assert torch.allclose(used_symbol[0], expected_symbol, atol=1e-12) and torch.allclose(used_blank[0], expected_blank, atol=1e-12)


# ---- invariances ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([-1, 2, 77]), st.sampled_from([0.0, 0.4]))
def test_nothing_in_the_padding_matters_and_its_gradient_is_zero(seed, filling, fast_emit):
    logits, targets, lengths, target_lengths = case(seed)
    losses, grad = loss_and_gradient(logits, targets, lengths, target_lengths, blank=2, fast_emit=fast_emit)
    real = inside(logits, lengths, target_lengths)
    assert (grad[~real] == 0).all()
    other = torch.where(real[..., None], logits, 1e4 * noise(seed + 1, *logits.shape))
    filled = targets.masked_fill(torch.arange(targets.shape[1]) >= target_lengths[:, None], filling)
    again = loss_and_gradient(other, filled, lengths, target_lengths, blank=2, fast_emit=fast_emit)
    assert torch.equal(losses, again[0]) and torch.equal(grad, again[1])


def test_each_utterance_alone_gives_the_same_loss_and_gradient():
    logits, targets, lengths, target_lengths = case(5, n=6, n_steps=SLICE + 5, n_tokens=6)
    losses, grad = loss_and_gradient(logits, targets, lengths, target_lengths, blank=2)
    for i, (t, u) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        alone = loss_and_gradient(logits[i : i + 1, :t, : u + 1], targets[i : i + 1, :u], tensor([t]), tensor([u]), blank=2)
        assert losses[i].item() == pytest.approx(alone[0].item(), abs=1e-12)
        assert torch.allclose(grad[i, :t, : u + 1], (i + 1) * alone[1][0], atol=1e-12)


def test_a_shift_of_all_logits_of_a_node_changes_nothing():
    logits, *args = case(1)
    shifted = logits + 50 * noise(2, *logits.shape[:3], 1)
    for a, b in zip(loss_and_gradient(logits, *args, blank=2), loss_and_gradient(shifted, *args, blank=2)):
        assert torch.allclose(a, b, atol=1e-10)
    assert loss_and_gradient(logits, *args, blank=2)[1].sum(dim=-1).abs().max() < 1e-12  # what follows from it


@pytest.mark.parametrize("n_steps", [1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 1])
@pytest.mark.parametrize("fast_emit", [0.0, 0.7])
def test_the_gradient_is_that_of_the_weighted_arcs(n_steps, fast_emit):
    """Autograd of Σ γ · log p over the arcs, the symbols' part times 1 + λ: the formula of the chapter, with a large copy of the logits."""
    logits, targets, lengths, target_lengths = case(n_steps, n_steps=n_steps)
    losses, grad = loss_and_gradient(logits, targets, lengths, target_lengths, blank=2, fast_emit=fast_emit)
    assert torch.equal(losses, transducer_loss(logits, targets, lengths, target_lengths, blank=2))  # λ changes no value
    x = logits.clone().requires_grad_()
    lp = x.log_softmax(dim=-1)
    symbol, blank = lp[:, :, :-1].gather(3, targets[:, None, :, None].expand(-1, n_steps, -1, -1))[..., 0], lp[..., 2]
    _, used_symbol, used_blank = arc_posteriors(symbol, blank, lengths, target_lengths)
    weights = torch.arange(1, len(logits) + 1)
    total = ((1 + fast_emit) * (used_symbol * symbol).sum(dim=(1, 2)) + (used_blank * blank).sum(dim=(1, 2))) * weights
    assert torch.allclose(grad, torch.autograd.grad(-total.sum(), x)[0], atol=1e-12)


def test_other_layouts_and_number_types_of_the_arguments():
    logits, *args = case(3)
    expected = loss_and_gradient(logits, *args, blank=2)
    turned = logits.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    assert not turned.is_contiguous()
    for a, b in zip(expected, loss_and_gradient(turned, *args, blank=2)):
        assert torch.allclose(a, b, atol=1e-12)
    for a, b in zip(expected, loss_and_gradient(logits, *(x.int() for x in args), blank=2)):
        assert torch.equal(a, b)
    x = logits[:, :1].clone().requires_grad_()  # the same row for all steps, without a copy
    spread = transducer_loss(x.expand_as(logits), *args, blank=2).sum()
    y = logits[:, :1].repeat(1, logits.shape[1], 1, 1).requires_grad_()
    copied = transducer_loss(y, *args, blank=2).sum()
    assert torch.allclose(torch.autograd.grad(spread, x)[0], torch.autograd.grad(copied, y)[0].sum(dim=1, keepdim=True), atol=1e-12)


# ---- precision and memory -------------------------------------------------------------------------------------------


def test_32_bits_are_close_to_64_for_long_utterances():
    logits, *args = case(0, n=2, n_steps=400, n_tokens=60, vocab=30, dtype=torch.float32)
    single, double = (loss_and_gradient(3 * x, *args, blank=2) for x in (logits, logits.double()))
    assert ((single[0] - double[0]) / double[0]).abs().max() < 1e-6 and (single[1] - double[1]).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_of_16_bits_lose_nothing_but_the_rounding_of_the_gradient(dtype, digits, overwrite):
    logits, *args = case(0, n=2, n_steps=120, n_tokens=20, vocab=40)
    half = (3 * logits).to(dtype)
    truth = loss_and_gradient(half.double(), *args, blank=2)
    source = half.clone().requires_grad_()
    losses = transducer_loss(source * 1.0, *args, blank=2, overwrite_logits=overwrite)
    assert losses.dtype == torch.float32 and torch.allclose(losses.double(), truth[0], rtol=1e-6)
    grad = torch.autograd.grad((losses * tensor([1, 2])).sum(), source)[0]
    assert grad.dtype == dtype and (grad.double() - truth[1]).abs().max() < 2 * digits


def test_overwritten_logits_hold_the_gradient_and_cannot_be_used_again():
    logits, *args = case(4, n_steps=SLICE + 2)
    source = logits.clone().requires_grad_()
    product = source * 1.0
    loss = transducer_loss(product, *args, blank=2, overwrite_logits=True).sum()
    grad, = torch.autograd.grad(loss, source, retain_graph=True)
    plain = logits.clone().requires_grad_()
    assert torch.allclose(grad, torch.autograd.grad(transducer_loss(plain, *args, blank=2).sum(), plain)[0])
    assert torch.allclose(product.detach(), grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # not a wrong gradient in silence
        torch.autograd.grad(loss, source)
    product = source * 1.0
    both = product.square().sum() + transducer_loss(product, *args, blank=2, overwrite_logits=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


def test_a_second_derivative_is_refused():
    logits, *args = case()
    x = logits.requires_grad_()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(weight * transducer_loss(x, *args, blank=2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- what must be refused -------------------------------------------------------------------------------------------


def test_errors_name_utterance_place_and_need():
    logits, targets, lengths, target_lengths = case(0, n=3, vocab=6, blank=2)
    target_lengths[:] = 4

    def message(**change):
        arguments = {"targets": targets, "lengths": lengths, "target_lengths": target_lengths, "blank": 2} | change
        with pytest.raises(ValueError) as raised:
            transducer_loss(logits, arguments["targets"], arguments["lengths"], arguments["target_lengths"], blank=arguments["blank"])
        return str(raised.value)

    assert message(lengths=tensor([7, 8, 9])) == (
        "lengths of utterance 1 is 8; it must lie between 1 and 7. Lengths count the encoder's steps, not the frames before its front end"
    )
    assert message(lengths=tensor([7, 7, 0])).startswith("lengths of utterance 2 is 0;")
    assert message(target_lengths=tensor([4, 4, -1])).startswith("target_lengths of utterance 2 is -1; it must lie between 0 and 4")
    assert message(target_lengths=tensor([4, 5, 4])).startswith("target_lengths of utterance 1 is 5;")
    wrong = targets.clone()
    wrong[2, 3] = 6
    assert message(targets=wrong) == "target 2 has symbol 6 at place 3; expected 0 to 5, and not the blank (2)"
    wrong[1, 0] = 2
    assert message(targets=wrong).startswith("target 1 has symbol 2 at place 0")
    assert message(blank=6) == "blank is 6; it must be one of the 6 symbols" and "blank is -1" in message(blank=-1)
    assert message(targets=targets[:, :3], target_lengths=tensor([3, 3, 3])) == (
        "the joiner's output has 5 rows, but targets of 3 symbols need 4: one before each symbol, and one after the last"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_named_where_they_matter(bad):
    logits, targets, lengths, target_lengths = case(6)
    lengths[1], target_lengths[1] = 5, 2
    for step, row, symbol in ((0, 0, 0), (4, 2, 2), (2, 1, 5)):
        damaged = logits.clone()
        damaged[1, step, row, symbol] = bad
        with pytest.raises(ArithmeticError, match="the loss of utterance 1 is nan; its logits hold NaN or infinite values"):
            transducer_loss(damaged, targets, lengths, target_lengths, blank=2)
    beyond = logits.clone()
    beyond[1, 5:], beyond[1, :, 3:] = bad, bad
    expected = transducer_loss(logits, targets, lengths, target_lengths, blank=2)
    assert torch.equal(transducer_loss(beyond, targets, lengths, target_lengths, blank=2), expected)


def test_a_text_without_a_path():
    """A forbidden symbol that the text needs is an error of the loss; the lattice itself says minus infinity, and its gradient is zero, not NaN."""
    logits, targets, lengths, target_lengths = case(7)
    target_lengths[1] = 3
    logits[1, :, 1, targets[1, 1]] = -math.inf
    with pytest.raises(ArithmeticError, match="the loss of utterance 1 is inf"):
        transducer_loss(logits, targets, lengths, target_lengths, blank=2)
    unused = next(k for k in range(6) if k != 2 and k not in targets[2].tolist())
    logits[1], logits[2, ..., unused] = 0.0, -math.inf  # but a symbol that no text needs may be forbidden
    losses, grad = loss_and_gradient(logits, targets, lengths, target_lengths, blank=2)
    assert losses.isfinite().all() and grad.isfinite().all() and (grad[2, ..., unused] == 0).all()
    symbol, blank = noise(1, 2, 4, 2).requires_grad_(), noise(2, 2, 4, 3).requires_grad_()
    with torch.no_grad():
        symbol[1, :, 0] = -math.inf
    log_p = lattice_log_prob(symbol, blank, tensor([4, 4]), tensor([2, 1]))
    grads = torch.autograd.grad(log_p.clamp(min=-1e3).sum(), (symbol, blank))
    assert log_p[0].isfinite() and log_p[1] == -math.inf
    assert all(x.isfinite().all() and (x[1] == 0).all() and (x[0] != 0).any() for x in grads)
    _, *used = arc_posteriors(symbol, blank, tensor([4, 4]), tensor([2, 1]))
    assert all((x[1] == 0).all() for x in used)


# ---- predictor, joiner, picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_predictor_is_an_embedding_and_a_window(context_size):
    torch.manual_seed(0)
    decoder = Decoder(7, 8, 3, context_size)
    y = tensor([[3, 1, 6, 6, -1, 2], [-1, -1, 5, 0, 3, 4]])
    embedded = torch.where((y < 0)[..., None], 0.0, decoder.embedding.weight[y.clamp(min=0)])
    expected = torch.zeros(2, 6, 8)
    for t, k in itertools.product(range(6), range(context_size)):
        if t - k < 0:
            continue
        if context_size == 1:
            expected[:, t] = embedded[:, t]  # without ReLU, as in the recipes
        else:
            for group in range(2):  # two groups of four channels
                channels = slice(4 * group, 4 * group + 4)
                expected[:, t, channels] += embedded[:, t - k, channels] @ decoder.conv.weight[channels, :, context_size - 1 - k].T
    expected = expected if context_size == 1 else expected.relu()
    out = decoder(y)
    assert torch.allclose(out, expected, atol=1e-6) and (context_size > 1 or (out < 0).any())
    for t in range(context_size - 1, 6):
        assert torch.allclose(decoder(y[:, t - context_size + 1 : t + 1], need_pad=False)[:, 0], out[:, t], atol=1e-6)


def test_joiner_starts_small_and_spreads_axes():
    torch.manual_seed(1)
    joiner = Joiner(10, 8, 6, 5)
    torch.manual_seed(1)
    plain = nn.Linear(10, 6), nn.Linear(8, 6), nn.Linear(6, 5)
    for part, linear, factor in zip((joiner.encoder_proj, joiner.decoder_proj, joiner.output_linear), plain, (0.25, 0.25, 1.0)):
        assert torch.equal(part.weight, factor * linear.weight) and torch.equal(part.bias, factor * linear.bias)
    sound, text = noise(0, 2, 4, 10, dtype=torch.float32), noise(1, 2, 3, 8, dtype=torch.float32)
    logits = joiner(sound[:, :, None], text[:, None])
    assert logits.shape == (2, 4, 3, 5)
    for i, t, u in itertools.product(range(2), range(4), range(3)):
        hidden = torch.tanh(joiner.encoder_proj(sound[i, t]) + joiner.decoder_proj(text[i, u]))
        assert torch.allclose(logits[i, t, u], joiner.output_linear(hidden), atol=1e-6)
    projected = joiner(joiner.encoder_proj(sound)[:, :, None], joiner.decoder_proj(text)[:, None], project_input=False)
    assert torch.allclose(projected, logits, atol=1e-6)


@pytest.mark.parametrize("path", sorted([*GOLDEN.glob("decoder_*"), *GOLDEN.glob("joiner*")]), ids=lambda p: p.stem)
def test_golden_files_hold_a_gradient_for_every_parameter_and_input(path):
    """The comparison with the reference elsewhere skips what a file does not have; here is what each must have."""
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    module = (Decoder if meta["module"] == "Decoder" else Joiner)(**meta["kwargs"])
    skipped = ("encoder_proj", "decoder_proj") if meta.get("call") == {"project_input": False} else ()
    assert {f"grads.{name}" for name, _ in module.named_parameters() if not name.startswith(skipped or "-")} <= set(stored)
    assert {name.replace("input.", "grad_input.") for name, x in stored.items() if name.startswith("input.") and x.is_floating_point()} <= set(stored)
    assert stored["output"].abs().max() > 0.05 and stored["grad_output"].shape == stored["output"].shape


def test_there_are_golden_files():
    assert len([*GOLDEN.glob("decoder_*")]) == 5 and len([*GOLDEN.glob("joiner*")]) == 2


def test_lattice_picture():
    import matplotlib.pyplot as plt

    _, used_symbol, used_blank = arc_posteriors(noise(0, 1, 6, 3), noise(1, 1, 6, 4), tensor([6]), tensor([3]))
    ax = plot_transducer_lattice(used_symbol[0], used_blank[0], ["a", " ", "b"], frame_seconds=0.04)
    assert ax.get_xlabel() == "time (s)" and [label.get_text() for label in ax.get_yticklabels()] == ["a", "␣", "b"]
    assert ax.get_xlim() == pytest.approx((0, 0.24)) and len(ax.collections[0].get_offsets()) == int((used_symbol[0] >= 0.1).sum())
    with pytest.raises(ValueError, match="2 names"):
        plot_transducer_lattice(used_symbol[0], used_blank[0], ["a", "b"])
    plt.close("all")
