"""CTC and transducer losses: by hand, by enumeration, against torch, against stored reference outputs."""
import itertools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from speechlearn.alignment.ctc import collapse, ctc_brute_force, ctc_greedy, ctc_loss, ctc_posteriors, penalise_blank, plot_lattice, with_blanks
from speechlearn.alignment.pruned import loss_scales, pruned_loss, pruned_transducer_losses, pruning_band, rows_of, simple_arcs
from speechlearn.alignment.transducer import SLICE, Decoder, Joiner, NodeLoss, arc_posteriors, lattice_log_prob, transducer_brute_force, transducer_loss

GOLDEN = Path(__file__).parent / "golden" / "zipformer"
AB = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64).log()


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


def log_probs_of(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).log_softmax(dim=-1)


# ---- CTC ------------------------------------------------------------------------------------------------------


def test_ctc_by_hand():
    loss = ctc_loss(AB[None], tensor([[1]]), tensor([3]), tensor([1]), blank=0)
    assert loss.item() == pytest.approx(-math.log(0.645))
    log_p, gamma = ctc_posteriors(AB[None], tensor([[1]]), tensor([3]), tensor([1]), blank=0)
    assert gamma[0, 1, 1].item() == pytest.approx(0.567 / 0.645)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4), st.data())
def test_ctc_equals_the_enumeration_of_all_paths(seed, vocab, sizes, data):
    blank = data.draw(st.integers(0, vocab - 1))
    steps, tokens = max(max(t for t, _ in sizes), 1), max(u for _, u in sizes)
    letters = [k for k in range(vocab) if k != blank]
    texts = [[data.draw(st.sampled_from(letters)) for _ in range(u)] for _, u in sizes]
    targets = torch.full((len(sizes), tokens), data.draw(st.sampled_from([-1, blank, 99])))  # padding may hold anything
    for row, text in zip(targets, texts):
        row[: len(text)] = tensor(text)
    lengths, target_lengths = tensor([t for t, _ in sizes]), tensor([u for _, u in sizes])
    x = log_probs_of(seed, len(sizes), steps, vocab)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = ctc_loss(x, targets, lengths, target_lengths, blank=blank)
    for i, ((t, _), text) in enumerate(zip(sizes, texts)):
        truth = -ctc_brute_force(x[i, :t], text, blank=blank).item()
        assert losses[i].item() == pytest.approx(truth, abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_ctc_equals_torch_in_64_bits(seed):
    g = torch.Generator().manual_seed(seed)
    n, steps, tokens, vocab = 5, 40, 8, 6
    targets = torch.randint(1, 4, (n, tokens), generator=g)
    target_lengths = torch.randint(0, tokens + 1, (n,), generator=g)
    lengths = torch.randint(2 * tokens, steps + 1, (n,), generator=g)
    logits = torch.randn(n, steps, vocab, generator=g, dtype=torch.float64)
    grads, losses = [], []
    for function in (lambda lp: ctc_loss(lp, targets, lengths, target_lengths, blank=0), lambda lp: F.ctc_loss(lp.transpose(0, 1), targets, lengths, target_lengths, reduction="none")):
        x = logits.clone().requires_grad_()
        loss = function(x.log_softmax(dim=-1))
        losses.append(loss.detach())
        grads.append(torch.autograd.grad((loss * torch.arange(1, n + 1)).sum(), x)[0])
    assert torch.allclose(*losses, atol=1e-10, rtol=1e-12) and torch.allclose(*grads, atol=1e-10)


def test_ctc_in_32_bits_is_close_to_64_bits_also_for_long_utterances():
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 600, 40, generator=g), torch.randint(1, 40, (2, 90), generator=g)
    results = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        loss = ctc_loss(x.log_softmax(dim=-1), targets, tensor([600, 580]), tensor([90, 80]), blank=0)
        results.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    assert ((results[0][0] - results[1][0]) / results[1][0]).abs().max() < 1e-6
    assert (results[0][1] - results[1][1]).abs().max() < 1e-5


def test_ctc_gradcheck_with_and_without_log_softmax():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    args = tensor([[1, 1, 2], [3, -1, -1]]), tensor([6, 4]), tensor([3, 1])
    assert torch.autograd.gradcheck(lambda x: ctc_loss(x.log_softmax(dim=-1), *args, blank=0), x.clone().requires_grad_())
    below_zero = (x - 10).requires_grad_()  # not normalised: the gradient must be right all the same
    assert torch.autograd.gradcheck(lambda x: ctc_loss(x, *args, blank=0, label_smoothing=0.2), below_zero)


def test_ctc_posteriors_sum_to_one_where_there_is_sound_and_are_zero_elsewhere():
    _, gamma = ctc_posteriors(log_probs_of(2, 3, 7, 5), tensor([[1, 2], [3, 3], [4, 1]]), tensor([7, 4, 5]), tensor([2, 2, 1]), blank=0)
    sums = gamma.sum(dim=2)
    for i, n in enumerate((7, 4, 5)):
        assert torch.allclose(sums[i, :n], torch.ones(n, dtype=torch.float64)) and (sums[i, n:] == 0).all()
    assert (gamma[2, :, 3:] == 0).all()


def test_ctc_does_not_read_padding_and_does_not_depend_on_batch_mates():
    x, targets = log_probs_of(3, 3, 8, 5), tensor([[1, 2, 2], [3, 1, 4], [4, 1, 1]])
    lengths, target_lengths = tensor([8, 5, 6]), tensor([3, 1, 2])
    together = ctc_loss(x, targets, lengths, target_lengths, blank=0)
    for i, (n, u) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        alone = ctc_loss(x[i : i + 1, :n], targets[i : i + 1, :u], tensor([n]), tensor([u]), blank=0)
        assert together[i].item() == pytest.approx(alone.item(), abs=1e-12)
    leaf = x.clone().requires_grad_()
    grad = torch.autograd.grad(ctc_loss(leaf, targets, lengths, target_lengths, blank=0).sum(), leaf)[0]
    assert (grad[1, 5:] == 0).all() and (grad[2, 6:] == 0).all()


def test_ctc_impossible_texts_are_named():
    x = log_probs_of(4, 2, 5, 28).requires_grad_()
    args = tensor([[1, 2, 3, 4, 5], [8, 5, 12, 12, 15]]), tensor([5, 5]), tensor([5, 5])
    with pytest.warns(UserWarning, match=r"utterance 1 has 5 steps, but its text of 5 symbols needs more.*1 of 2"):
        losses = ctc_loss(x, *args, blank=0)
    assert losses[0].isfinite() and losses[1] == math.inf
    grad = torch.autograd.grad(losses.sum(), x)[0]
    assert grad.isfinite().all() and (grad[1] == 0).all() and (grad[0] != 0).any()
    with pytest.raises(ValueError, match="utterance 1 has 5 steps"):
        ctc_loss(x, *args, blank=0, impossible="raise")
    assert ctc_loss(x, *args, blank=0, impossible="zero")[1].item() == 0
    with pytest.raises(ValueError, match="expected 'warn', 'raise' or 'zero'"):
        ctc_loss(x, *args, blank=0, impossible="ignore")


def test_ctc_edges():
    nothing = ctc_loss(AB[None], torch.zeros(1, 0, dtype=torch.long), tensor([3]), tensor([0]), blank=0)
    assert nothing.item() == pytest.approx(-math.log(0.6 * 0.2 * 0.5))
    assert ctc_loss(AB[None], tensor([[1]]), tensor([0]), tensor([0]), blank=0).item() == 0
    forbidden = AB.clone()
    forbidden[:, 1] = -math.inf
    x = forbidden[None].requires_grad_()
    loss = ctc_loss(x, tensor([[1]]), tensor([3]), tensor([1]), blank=0)
    assert loss.item() == math.inf and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(log_probs=torch.ones(1, 3, 3)), "apply log_softmax|Apply log_softmax"),
        (dict(targets=tensor([[0]])), "target 0 has symbol 0 at place 0: this is the blank"),
        (dict(targets=tensor([[3]])), "symbols go from 0 to 2"),
        (dict(lengths=tensor([4])), "lengths of utterance 0 is 4; it must lie between 0 and 3"),
        (dict(lengths=tensor([-1])), "lengths of utterance 0 is -1"),
        (dict(target_lengths=tensor([2])), "target_lengths of utterance 0 is 2"),
        (dict(blank=3), "blank is 3"),
        (dict(label_smoothing=1.0), "label_smoothing is 1.0"),
    ],
)
def test_ctc_errors(change, message):
    arguments = dict(log_probs=AB[None].float(), targets=tensor([[1]]), lengths=tensor([3]), target_lengths=tensor([1]), blank=0) | change
    with pytest.raises(ValueError, match=message):
        ctc_loss(arguments.pop("log_probs"), arguments.pop("targets"), arguments.pop("lengths"), arguments.pop("target_lengths"), **arguments)


def test_ctc_nan_is_named():
    x = AB[None].repeat(2, 1, 1)
    x[1, 2] = math.nan
    with pytest.raises(ArithmeticError, match="utterance 1"):
        ctc_loss(x, tensor([[1], [2]]), tensor([3, 3]), tensor([1, 1]), blank=0)
    with pytest.raises(ArithmeticError, match="utterance 1"):
        ctc_greedy(x, tensor([3, 3]), blank=0)


def test_label_smoothing_is_the_formula():
    args = AB[None], tensor([[1]]), tensor([2]), tensor([1])
    plain = ctc_loss(*args, blank=0).item()
    flat = -AB[:2].mean(dim=1).sum().item()
    assert ctc_loss(*args, blank=0, label_smoothing=0.1).item() == pytest.approx(0.9 * plain + 0.1 * flat)


def test_penalise_blank():
    y = penalise_blank(AB, 1.5, blank=0)
    assert torch.allclose(y.exp().sum(dim=-1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose((y[:, 0] - y[:, 1]) - (AB[:, 0] - AB[:, 1]), torch.full((3,), -1.5, dtype=torch.float64))
    assert torch.allclose(penalise_blank(AB, 0.0, blank=0), AB)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3))
def test_greedy_finds_a_written_path(path, blank):
    one_hot = F.one_hot(tensor(path), 4).double() if path else torch.zeros(0, 4, dtype=torch.float64)
    x = (10 * one_hot).log_softmax(dim=-1)[None]
    padded = torch.cat([x, log_probs_of(0, 1, 3, 4)], dim=1)
    found = ctc_greedy(padded, tensor([len(path)]), blank=blank)[0]
    assert list(found.tokens) == collapse(path, blank=blank)
    for token, (first, last) in zip(found.tokens, found.spans):
        assert path[first : last + 1] == [token] * (last - first + 1)
        assert first == 0 or path[first - 1] != token


def test_lattice_pictures():
    _, gamma = ctc_posteriors(AB[None], tensor([[1]]), tensor([3]), tensor([1]), blank=0)
    assert plot_lattice(gamma[0], "a").get_xlabel() == "step"
    with pytest.raises(ValueError, match="2 symbols have 5 states, but the posteriors have 3"):
        plot_lattice(gamma[0], "ab")
    assert with_blanks(tensor([[1, 2]]), blank=7).tolist() == [[7, 1, 7, 2, 7]]


# ---- transducer -----------------------------------------------------------------------------------------------


def test_transducer_by_hand():
    p = torch.tensor([[[0.6, 0.4], [0.9, 0.1]], [[0.3, 0.7], [0.8, 0.2]]], dtype=torch.float64)
    assert transducer_loss(p.log()[None], tensor([[1]]), tensor([2]), tensor([1]), blank=0).item() == pytest.approx(-math.log(0.624))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4), st.data())
def test_transducer_equals_the_enumeration_of_all_paths(seed, vocab, sizes, data):
    blank = data.draw(st.integers(0, vocab - 1))
    letters = [k for k in range(vocab) if k != blank]
    steps, tokens = max(t for t, _ in sizes), max(u for _, u in sizes)
    texts = [[data.draw(st.sampled_from(letters)) for _ in range(u)] for _, u in sizes]
    targets = torch.full((len(sizes), tokens), data.draw(st.sampled_from([-1, blank, 99])))
    for row, text in zip(targets, texts):
        row[: len(text)] = tensor(text)
    logits = torch.randn(len(sizes), steps, tokens + 1, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = transducer_loss(x, targets, tensor([t for t, _ in sizes]), tensor([u for _, u in sizes]), blank=blank)
    truth = torch.stack([-transducer_brute_force(y[i, :t, : u + 1].log_softmax(dim=-1), text, blank=blank) for i, ((t, u), text) in enumerate(zip(sizes, texts))])
    assert torch.allclose(losses, truth, atol=1e-10)
    weights = torch.arange(1, len(sizes) + 1, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((loss * weights).sum(), leaf)[0] for loss, leaf in ((losses, x), (truth, y)))
    assert torch.allclose(ours, theirs, atol=1e-10)


def random_lattice(n_steps=9, n_tokens=5, vocab=6, n=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_steps, n_tokens + 1, vocab, generator=g, dtype=dtype)
    lengths = torch.randint(1, n_steps + 1, (n,), generator=g)
    target_lengths = torch.randint(0, n_tokens + 1, (n,), generator=g)
    lengths[0], target_lengths[0] = n_steps, n_tokens
    return logits, torch.randint(1, vocab, (n, n_tokens), generator=g), lengths, target_lengths


@pytest.mark.parametrize("n_steps", [1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 1])
def test_transducer_equals_the_recursion_with_two_loops(n_steps):
    logits, targets, lengths, target_lengths = random_lattice(n_steps, seed=n_steps)
    losses = transducer_loss(logits, targets, lengths, target_lengths, blank=0)
    for i, (t_end, u_end) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        lp, alpha = logits[i].log_softmax(dim=-1), {(0, 0): 0.0}
        for t, u in itertools.product(range(t_end), range(u_end + 1)):
            ways = ([alpha[t - 1, u] + lp[t - 1, u, 0].item()] if t else []) + ([alpha[t, u - 1] + lp[t, u - 1, targets[i, u - 1]].item()] if u else [])
            if ways:
                alpha[t, u] = max(ways) + math.log(sum(math.exp(w - max(ways)) for w in ways))
        assert losses[i].item() == pytest.approx(-(alpha[t_end - 1, u_end] + lp[t_end - 1, u_end, 0].item()), rel=1e-10)


def test_transducer_gradients():
    logits, targets, lengths, target_lengths = random_lattice(4, 3, 4)
    args = targets, lengths, target_lengths
    assert torch.autograd.gradcheck(lambda x: transducer_loss(x, *args, blank=0), logits.clone().requires_grad_())
    symbol, blank = (torch.randn(3, 4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).requires_grad_() for n in (3, 4))
    assert torch.autograd.gradcheck(lambda s, b: lattice_log_prob(s, b, lengths, target_lengths), (symbol, blank))


def test_overwriting_the_logits_gives_the_same_gradient():
    logits, *args = random_lattice(SLICE + 3)
    plain, source = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    transducer_loss(plain, *args, blank=0).sum().backward()
    product = source * 1.0
    loss = transducer_loss(product, *args, blank=0, overwrite_logits=True)
    loss.sum().backward()
    assert torch.allclose(plain.grad, source.grad) and not torch.allclose(product.detach(), logits)


def test_posteriors_of_arcs_count_symbols_and_steps():
    logits, targets, lengths, target_lengths = random_lattice(12, 5, 6, n=6, seed=3)
    lp = logits.log_softmax(dim=-1)
    symbol = lp[:, :, :-1].gather(3, targets[:, None, :, None].expand(-1, 12, -1, -1))[..., 0]
    _, used_symbol, used_blank = arc_posteriors(symbol, lp[..., 0], lengths, target_lengths)
    assert torch.allclose(used_symbol.sum(dim=(1, 2)), target_lengths.double()) and torch.allclose(used_blank.sum(dim=(1, 2)), lengths.double())
    for i, (t, u) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        assert (used_symbol[i, t:] == 0).all() and (used_symbol[i, :, u:] == 0).all() and (used_blank[i, :, u + 1 :] == 0).all()


def test_fast_emit_multiplies_the_symbol_part_only():
    symbol, blank = (torch.randn(1, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    grads = []
    for fast_emit in (0.0, 0.3):
        leaves = symbol.clone().requires_grad_(), blank.clone().requires_grad_()
        grads.append(torch.autograd.grad(lattice_log_prob(*leaves, tensor([5]), tensor([2]), fast_emit=fast_emit).sum(), leaves))
    assert torch.allclose(grads[1][0], 1.3 * grads[0][0]) and torch.equal(grads[1][1], grads[0][1])


def test_transducer_loss_allocates_no_copy_of_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Storages(TorchDispatchMode):
        """Keeps every storage that an operation returns, so that no address is used twice."""

        def __init__(self):
            super().__init__()
            self.kept = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.kept[out.untyped_storage().data_ptr()] = out.untyped_storage()
            return out

    logits, *args = random_lattice(96, 20, 100, n=2, dtype=torch.float32)
    nbytes = logits.numel() * 4
    for overwrite, new in ((False, 1), (True, 0)):
        leaf = logits.clone().requires_grad_()
        with Storages() as storages:
            loss = transducer_loss(leaf, *args, blank=0, overwrite_logits=overwrite)
        large = {address for address, storage in storages.kept.items() if storage.nbytes() > nbytes / 3}
        assert large <= {leaf.data_ptr()}, "the forward makes something of the size of the logits"
        with Storages() as storages:
            torch.autograd.grad(loss.sum(), leaf)
        large = {address for address, storage in storages.kept.items() if storage.nbytes() > nbytes / 3} - {leaf.data_ptr()}
        assert len(large) == new, f"the backward makes {len(large)} tensors of the size of the logits, expected {new}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets=tensor([[1, 2]])), "has 2 rows, but targets of 2 symbols need 3"),
        (dict(lengths=tensor([0])), "lengths of utterance 0 is 0; it must lie between 1 and 2"),
        (dict(lengths=tensor([3])), "lengths of utterance 0 is 3"),
        (dict(target_lengths=tensor([2])), "target_lengths of utterance 0 is 2"),
        (dict(targets=tensor([[0]])), "not the blank"),
        (dict(targets=tensor([[5]])), "target 0 has symbol 5"),
        (dict(blank=7), "blank is 7"),
    ],
)
def test_transducer_errors(change, message):
    arguments = dict(targets=tensor([[1]]), lengths=tensor([2]), target_lengths=tensor([1]), blank=0) | change
    blank = arguments.pop("blank")
    with pytest.raises(ValueError, match=message):
        transducer_loss(torch.zeros(1, 2, 2, 4), *arguments.values(), blank=blank)


def test_transducer_nan_is_named():
    logits, *args = random_lattice()
    logits[2, 0, 0, 1] = math.nan
    with pytest.raises(ArithmeticError, match="utterance 2"):
        transducer_loss(logits, *args, blank=0)


def test_torchaudio_agrees_where_its_extension_loads():
    import speechlearn  # noqa: F401
    import torchaudio

    logits, targets, lengths, target_lengths = random_lattice(dtype=torch.float32)
    try:
        theirs = torchaudio.functional.rnnt_loss(logits, targets.int(), lengths.int(), target_lengths.int(), blank=0, reduction="none")
    except (RuntimeError, AttributeError, ImportError) as error:
        assert "rnnt" in str(error) or "extension" in str(error).lower() or "torchaudio" in str(error)
        pytest.skip(f"torchaudio's own kernel is missing in this build: {str(error).splitlines()[0]}")
    assert torch.allclose(transducer_loss(logits, targets, lengths, target_lengths, blank=0), theirs, atol=1e-4)


# ---- pruning ----------------------------------------------------------------------------------------------------


def test_simple_arcs_equal_the_joiner_that_adds_also_for_large_scores():
    g = torch.Generator().manual_seed(1)
    am, lm = (80 * torch.randn(2, n, 7, generator=g, dtype=torch.float64) for n in (6, 4))
    targets = torch.randint(1, 7, (2, 3), generator=g)
    symbol, blank = simple_arcs(am, lm, targets, blank=0, lm_scale=0.0)
    lp = (am[:, :, None] + lm[:, None]).log_softmax(dim=-1)
    assert torch.allclose(blank, lp[..., 0], rtol=1e-9) and torch.allclose(symbol, lp[:, :, :3].gather(3, targets[:, None, :, None].expand(-1, 6, -1, -1))[..., 0], rtol=1e-9)
    with pytest.raises(ValueError, match="at most 1 together"):
        simple_arcs(am, lm, targets, blank=0, lm_scale=0.7, am_scale=0.7)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 15), st.integers(0, 20)), min_size=1, max_size=4), st.integers(2, 9))
def test_band_holds_its_promises(seed, sizes, n_rows):
    steps, tokens = max(t for t, _ in sizes), max(u for _, u in sizes)
    lengths, target_lengths = tensor([t for t, _ in sizes]), tensor([u for _, u in sizes])
    g = torch.Generator().manual_seed(seed)
    symbol, blank = (-5 * torch.rand(len(sizes), steps, n, generator=g, dtype=torch.float64) for n in (tokens, tokens + 1))
    _, used_symbol, used_blank = arc_posteriors(symbol, blank, lengths, target_lengths)
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=n_rows)
    kept = band.shape[2]
    assert (band.diff(dim=2) == 1).all() and (band[:, 0, 0] == 0).all() and band.min() >= 0 and band.max() <= tokens
    assert (band[:, :, 0].diff(dim=1) >= 0).all() and (band[:, :, 0].diff(dim=1) <= max(kept - 1, 0)).all()
    for i, (t, u) in enumerate(sizes):
        assert band[i, t - 1, 0] <= u <= band[i, t - 1, -1], "the end of the text lies outside the band at the last step"
    targets = torch.randint(1, 5, (len(sizes), tokens), generator=g)
    logits = torch.randn(len(sizes), steps, tokens + 1, 5, generator=g, dtype=torch.float64)
    full = transducer_loss(logits, targets, lengths, target_lengths, blank=0)
    some = pruned_loss(logits.gather(2, band[..., None].expand(-1, -1, -1, 5)), targets, band, lengths, target_lengths, blank=0)
    assert (some >= full - 1e-9).all() and some.isfinite().all()
    if kept == tokens + 1:
        assert torch.allclose(some, full)


def test_pruned_loss_gradcheck_and_errors():
    logits, targets, lengths, target_lengths = random_lattice(5, 4, 4)
    lengths[:] = tensor([5, 5, 4])
    _, used_symbol, used_blank = arc_posteriors(logits[:, :, :-1, 1], logits[..., 0], lengths, target_lengths)
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=3)
    kept = logits.gather(2, band[..., None].expand(-1, -1, -1, 4))
    assert torch.autograd.gradcheck(lambda x: pruned_loss(x, targets, band, lengths, target_lengths, blank=0), kept.clone().requires_grad_())
    with pytest.raises(ArithmeticError, match="no path gets through"):
        pruned_loss(kept, targets, torch.zeros_like(band) + torch.arange(3), tensor([5, 5, 4]), tensor([4, 4, 4]), blank=0)
    with pytest.raises(ValueError, match="fewer than 2 rows"):
        pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=1)


def test_loss_scales():
    assert loss_scales(0) == (1.0, 0.1) and loss_scales(1000) == pytest.approx((0.75, 0.55)) and loss_scales(9000) == (0.5, 1.0)


def gap(ours, stored):
    return float((ours.detach() - stored).abs().max() / stored.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("number", [0, 1])
def test_pruned_transducer_equals_the_reference(number):
    path = GOLDEN / f"pruned_transducer_{number}.safetensors"
    g = load_file(path)
    with safe_open(path, "pt") as file:
        k = json.loads(file.metadata()["meta"])["kwargs"]
    parts = nn.ModuleDict({
        "decoder": Decoder(k["vocab_size"], k["decoder_dim"], 0, k["context_size"]),
        "joiner": Joiner(k["encoder_dim"], k["decoder_dim"], k["joiner_dim"], k["vocab_size"]),
        "simple_am_proj": nn.Linear(k["encoder_dim"], k["vocab_size"]),
        "simple_lm_proj": nn.Linear(k["decoder_dim"], k["vocab_size"]),
    })
    parts.load_state_dict({name[7:]: value for name, value in g.items() if name.startswith("params.")}, strict=True)
    lengths, target_lengths = g["encoder_out_lens"], g["target_lengths"]
    targets = torch.full((2, int(target_lengths.max())), -1)
    for row, text in zip(targets, g["targets"].split(target_lengths.tolist())):
        row[: len(text)] = text
    encoder_out = g["encoder_out"].clone().requires_grad_()
    simple, pruned = pruned_transducer_losses(
        encoder_out, targets, lengths, target_lengths, **parts, blank=0, n_rows=k["prune_range"], lm_scale=k["lm_scale"], am_scale=k["am_scale"]
    )
    assert gap(simple.sum(), g["simple_loss"]) < 1e-5 and gap(pruned.sum(), g["pruned_loss"]) < 1e-5
    (0.5 * simple.sum() + pruned.sum()).backward()
    assert gap(encoder_out.grad, g["grad_input"]) < 1e-5
    for name, parameter in parts.named_parameters():
        assert gap(parameter.grad, g[f"grads.{name}"]) < 1e-4, name
    with torch.no_grad():
        clean = targets.clamp(min=0)
        rows = parts["decoder"](F.pad(clean, (1, 0)))
        arcs = simple_arcs(parts["simple_am_proj"](g["encoder_out"]), parts["simple_lm_proj"](rows), clean, blank=0, lm_scale=k["lm_scale"], am_scale=k["am_scale"])
        _, used_symbol, used_blank = arc_posteriors(*arcs, lengths, target_lengths)
    assert gap(used_symbol.transpose(1, 2).float(), g["px_grad"][:, :, : used_symbol.shape[1]]) < 1e-5 and gap(used_blank.transpose(1, 2).float(), g["py_grad"]) < 1e-5
    assert torch.equal(pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=k["prune_range"]), g["ranges"])


@pytest.mark.parametrize("path", sorted([*GOLDEN.glob("decoder_*"), *GOLDEN.glob("joiner*")]), ids=lambda p: p.stem)
def test_predictor_and_joiner_equal_the_reference(path):
    g = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    module = (Decoder if meta["module"] == "Decoder" else Joiner)(**meta["kwargs"])
    module.load_state_dict({name[7:]: value for name, value in g.items() if name.startswith("params.")}, strict=True)
    inputs = {name[6:]: value.clone() for name, value in g.items() if name.startswith("input.")}
    for value in inputs.values():
        if value.is_floating_point():
            value.requires_grad_()
    active = meta["mode"] == "train_active"  # there the reference's balancers bend the gradients; chapter 18 has them
    out = module(**inputs, **(meta.get("call") or {}))
    assert gap(out, g["output"]) < 1e-5
    if "grad_output" not in g or active:
        return
    out.backward(g["grad_output"])
    for name, parameter in module.named_parameters():
        if f"grads.{name}" in g:
            assert gap(parameter.grad, g[f"grads.{name}"]) < 1e-4, name
    for name, value in inputs.items():
        if f"grad_input.{name}" in g:
            assert gap(value.grad, g[f"grad_input.{name}"]) < 1e-5, name


def test_predictor_sees_its_last_symbols_only_and_says_what_it_needs():
    decoder = Decoder(9, 8, 0, 3).eval()
    y = torch.randint(1, 9, (1, 6), generator=torch.Generator().manual_seed(0))
    changed = y.clone()
    changed[0, 1] = y[0, 1] % 8 + 1
    moved = (decoder(changed) - decoder(y)).detach().abs().sum(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [1, 2, 3]
    assert torch.allclose(decoder(y)[:, 4], decoder(y[:, 2:5], need_pad=False)[:, 0])
    with pytest.raises(ValueError, match="exactly 3 symbols, got 2"):
        decoder(y[:, :2], need_pad=False)
    with pytest.raises(ValueError, match="multiple of 4"):
        Decoder(9, 6, 0, 2)
    with pytest.raises(ValueError, match="context_size is 0"):
        Decoder(9, 8, 0, 0)


def test_rows_of_and_node_loss_without_a_band():
    x = torch.arange(12.0).reshape(1, 4, 3)
    assert rows_of(x, tensor([[[0, 1], [2, 3]]])).tolist() == [[x[0, :2].tolist(), x[0, 2:].tolist()]]
    logits, targets, lengths, target_lengths = random_lattice()
    next_symbol = F.pad(targets, (0, 1))[:, None].expand(-1, 9, -1)
    every = torch.arange(6).expand(3, 9, -1)
    with_band, without = (NodeLoss.apply(logits, next_symbol, band, 6, lengths, target_lengths, 0, 0.0, False) for band in (every, None))
    assert torch.allclose(with_band, without)
