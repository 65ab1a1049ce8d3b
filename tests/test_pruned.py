"""The pruned transducer: smoothing the slow way, the band against the recipe's rules written as loops, the pruned loss against paths inside the band."""
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from speechlearn.alignment.pruned import loss_scales, pruned_loss, pruned_transducer_losses, pruning_band, rows_of, simple_arcs
from speechlearn.alignment.transducer import Decoder, Joiner, arc_posteriors, lattice_log_prob, transducer_loss

GOLDEN = Path(__file__).parent / "golden" / "zipformer"


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the additive joiner --------------------------------------------------------------------------------------------


def slow_arcs(am, lm, targets, blank, lm_scale, am_scale):
    """The definition, with a tensor that has all axes."""
    n_steps, n_tokens = am.shape[1], targets.shape[1]
    both = (am[:, :, None] + lm[:, None]).log_softmax(dim=-1)
    lm_only = lm.log_softmax(dim=-1)[:, None].expand_as(both)
    average = lm.softmax(dim=-1).mean(dim=(0, 1)).log()
    am_only = (am + average).log_softmax(dim=-1)[:, :, None].expand_as(both)
    mixed = (1 - lm_scale - am_scale) * both + lm_scale * lm_only + am_scale * am_only
    return mixed[:, :, :n_tokens].gather(3, targets[:, None, :, None].expand(-1, n_steps, -1, -1))[..., 0], mixed[..., blank]


@pytest.mark.parametrize(("lm_scale", "am_scale"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.3), (0.1, 0.2), (1.0, 0.0), (0.0, 1.0)])
def test_smoothed_arcs_and_their_gradients_are_those_of_the_definition(lm_scale, am_scale):
    targets, weights = tensor([[1, 4, 1], [0, 2, 5]]), [noise(k, 2, 6, n) for k, n in ((3, 3), (4, 4))]
    results = []
    for function in (lambda *a: simple_arcs(*a, targets, blank=3, lm_scale=lm_scale, am_scale=am_scale), lambda *a: slow_arcs(*a, targets, 3, lm_scale, am_scale)):
        am, lm = (3 * noise(0, 2, 6, 7)).requires_grad_(), (3 * noise(1, 2, 4, 7)).requires_grad_()
        arcs = function(am, lm)
        total = sum((w * x).sum() for w, x in zip(weights, arcs))
        results.append([*arcs, *torch.autograd.grad(total, (am, lm), allow_unused=True, materialize_grads=True)])
    for ours, truth in zip(*results):
        assert torch.allclose(ours, truth, atol=1e-10)


def test_scores_of_a_thousand_in_32_bits():
    am, lm, targets = noise(0, 2, 5, 8, dtype=torch.float32) + 1000, noise(1, 2, 4, 8, dtype=torch.float32) - 500, tensor([[1, 2, 3], [4, 5, 6]])
    for ours, truth in zip(simple_arcs(am, lm, targets, blank=0, am_scale=0.1), slow_arcs(am.double(), lm.double(), targets, 0, 0.25, 0.1)):
        assert ours.dtype == torch.float32 and (ours - truth).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_arcs_of_16_bit_scores_are_computed_in_32(dtype, digits):
    """In float16 a sum of exponentials below 6e-5 would be lost: here the two sides agree on no symbol."""
    am, lm, targets = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), tensor([[1]])
    am[..., 0], lm[..., 2] = 14.0, 14.0
    for ours, truth in zip(simple_arcs(am.to(dtype), lm.to(dtype), targets, blank=0), slow_arcs(am.double(), lm.double(), targets, 0, 0.25, 0.0)):
        assert ours.dtype == torch.float32 and torch.allclose(ours.double(), truth, atol=1e-4)
    am, lm = noise(0, 2, 6, 9, dtype=torch.float32), noise(1, 2, 4, 9, dtype=torch.float32)
    targets = tensor([[1, 2, 3], [4, 5, 6]])
    for ours, truth in zip(simple_arcs(am.to(dtype), lm.to(dtype), targets, blank=0), simple_arcs(am, lm, targets, blank=0)):
        assert (ours - truth).abs().max() < 4 * digits


def test_scales_are_checked():
    x, y = noise(0, 1, 2, 3), noise(1, 1, 2, 3)
    for lm_scale, am_scale in ((-0.1, 0.0), (0.0, -0.1), (0.6, 0.5)):
        with pytest.raises(ValueError, match=re.escape(f"lm_scale ({lm_scale}) and am_scale ({am_scale}) must not be negative, and be at most 1 together")):
            simple_arcs(x, y, tensor([[1]]), blank=0, lm_scale=lm_scale, am_scale=am_scale)


# ---- the band -------------------------------------------------------------------------------------------------------


def band_starts_with_loops(used_symbol, used_blank, length, n_tokens, n_rows):
    """The recipe's rules for one utterance, one after the other."""
    n_steps, n_all = used_blank.shape
    starts = []
    for t in range(n_steps):
        if t >= length - 1:
            starts.append(max(0, n_tokens - n_rows + 1))
            continue
        values = []
        for s in range(n_all - n_rows + 1):
            values.append(sum(float(used_blank[t, s + k]) for k in range(n_rows)) - (float(used_symbol[t, s - 1]) if s else 0.0))
        starts.append(values.index(max(values)))
    for t in reversed(range(n_steps - 1)):  # never falling
        starts[t] = min(starts[t], starts[t + 1])
    for t in reversed(range(n_steps)):  # step t is reached from row 0 in t moves of at most R − 1, and so is each later step from step t
        later = starts[t + 1] - (n_rows - 1) if t + 1 < n_steps else 0
        starts[t] = max(starts[t], later)
    starts[0] = 0
    for t in range(1, n_steps):
        starts[t] = min(starts[t], t * (n_rows - 1))
    return starts


def posteriors(seed, sizes, strength=5.0):
    steps, tokens = max(t for t, _ in sizes), max(u for _, u in sizes)
    lengths, target_lengths = tensor([t for t, _ in sizes]), tensor([u for _, u in sizes])
    arcs = [-strength * torch.rand(len(sizes), steps, n, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64) for n in (tokens, tokens + 1)]
    _, *used = arc_posteriors(*arcs, lengths, target_lengths)
    return (*used, lengths, target_lengths)


def test_band_by_hand():
    """The chapter's step: rows 2 and 3 hold 0.9; but what is written into row 2 at this step would be cut."""
    used_blank = torch.zeros(1, 3, 5, dtype=torch.float64)
    used_blank[0, 0, 0], used_blank[0, 1], used_blank[0, 2, 4] = 1.0, torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0]), 1.0
    used_symbol = torch.zeros(1, 3, 4, dtype=torch.float64)
    args = tensor([3]), tensor([4])
    # with 2 rows, 3 steps could not reach row 4: the smallest number that connects the ends is 3
    assert pruning_band(used_symbol, used_blank, *args, n_rows=2).tolist() == [[[0, 1, 2], [1, 2, 3], [2, 3, 4]]]
    used_symbol[0, 1, 0] = 0.5  # into row 1, the first of that stretch: 1.0 − 0.5 is less than the 0.9 of rows 2 … 4
    assert pruning_band(used_symbol, used_blank, *args, n_rows=3)[0, 1].tolist() == [2, 3, 4]
    used_symbol[0, 1, 1] = 0.3  # into row 2: 0.9 − 0.3 is less than the 0.7 of rows 0 … 2
    assert pruning_band(used_symbol, used_blank, *args, n_rows=3)[0, 1].tolist() == [0, 1, 2]
    assert pruning_band(used_symbol, used_blank, *args, n_rows=5).tolist() == [[[0, 1, 2, 3, 4]] * 3]
    assert pruning_band(used_symbol[:, :, :0], used_blank[:, :, :1], tensor([3]), tensor([0]), n_rows=2).tolist() == [[[0]] * 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=3), st.integers(2, 6), st.sampled_from([2.0, 30.0]))
def test_band_follows_the_rules(seed, sizes, n_rows, strength):
    used_symbol, used_blank, lengths, target_lengths = posteriors(seed, sizes, strength)
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=n_rows)
    kept = band.shape[2]
    for i, (length, n_tokens) in enumerate(sizes):
        assert band[i, :, 0].tolist() == band_starts_with_loops(used_symbol[i], used_blank[i], length, n_tokens, kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30)), min_size=1, max_size=4), st.integers(2, 6))
def test_no_length_is_without_a_path(seed, sizes, n_rows):
    """Also where the text is much longer than the sound, in a batch with longer sounds."""
    used_symbol, used_blank, lengths, target_lengths = posteriors(seed, sizes)
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=n_rows)
    n, steps, kept = band.shape
    starts = band[:, :, 0]
    assert (starts[:, 0] == 0).all() and (band.diff(dim=2) == 1).all() and 0 <= band.min() and band.max() <= used_symbol.shape[2]
    assert (starts.diff(dim=1) >= 0).all() and (starts.diff(dim=1) <= max(0, kept - 1)).all()
    ends = band[torch.arange(n), lengths - 1]
    assert ((ends[:, 0] <= target_lengths) & (target_lengths <= ends[:, -1])).all()
    targets = torch.ones(n, used_symbol.shape[2], dtype=torch.long)
    assert pruned_loss(noise(seed, n, steps, kept, 3), targets, band, lengths, target_lengths, blank=0).isfinite().all()
    assert kept >= min(n_rows, used_symbol.shape[2] + 1)


def test_a_sure_lattice_lies_inside_its_band_and_is_not_raised_without_need():
    written = [1, 1, 4, 7, 8, 8, 13]  # steps of the symbols
    used_symbol, used_blank = torch.zeros(1, 16, 7, dtype=torch.float64), torch.zeros(1, 16, 8, dtype=torch.float64)
    for u, t in enumerate(written):
        used_symbol[0, t, u] = 1
    for t in range(16):
        used_blank[0, t, sum(w <= t for w in written)] = 1
    band = pruning_band(used_symbol, used_blank, tensor([16]), tensor([7]), n_rows=3)
    assert band.shape == (1, 16, 3) and used_blank.gather(2, band).sum() == 16
    assert F.pad(used_symbol, (0, 1)).gather(2, band).sum() == 7
    with pytest.raises(ValueError, match="n_rows is 1; with fewer than 2 rows at a step no path can write"):
        pruning_band(used_symbol, used_blank, tensor([16]), tensor([7]), n_rows=1)


def test_band_of_the_reference_and_its_empty_last_column():
    """What the reference calls px_grad has one column more than we have arcs: it must be empty."""
    for number in (0, 1):
        stored = load_file(GOLDEN / f"pruned_transducer_{number}.safetensors")
        assert stored["px_grad"].shape[2] == stored["encoder_out"].shape[1] + 1 and (stored["px_grad"][:, :, -1] == 0).all()
        px, py = stored["px_grad"][:, :, :-1].transpose(1, 2).double(), stored["py_grad"].transpose(1, 2).double()
        kept = stored["ranges"].shape[2]
        assert torch.equal(pruning_band(px, py, stored["encoder_out_lens"], stored["target_lengths"], n_rows=kept), stored["ranges"])


# ---- the pruned loss ------------------------------------------------------------------------------------------------


def loss_by_paths(log_probs, text, band, blank):
    """Minus the log of the sum over all paths whose nodes are all kept; `log_probs` has all rows."""
    n_steps, n_tokens, total = len(band), len(text), 0.0
    kept = [set(rows) for rows in band.tolist()]
    for written_at in itertools.combinations_with_replacement(range(n_steps), n_tokens):
        p, u = 0.0, 0
        for t in range(n_steps):
            while u < n_tokens and written_at[u] == t:
                p += float(log_probs[t, u, text[u]]) if u in kept[t] else -math.inf
                u += 1
            p += float(log_probs[t, u, blank]) if u in kept[t] else -math.inf
        total += math.exp(p)
    return -math.log(total)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=3), st.integers(2, 4), st.sampled_from([-1, 1, 50]))
def test_pruned_loss_is_the_sum_over_paths_inside_the_band(seed, sizes, n_rows, filling):
    used_symbol, used_blank, lengths, target_lengths = posteriors(seed, sizes)
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=n_rows)
    n, steps, n_tokens = used_symbol.shape
    targets = torch.randint(2, 5, (n, n_tokens), generator=torch.Generator().manual_seed(seed))
    logits = noise(seed, n, steps, n_tokens + 1, 5)
    filled = targets.masked_fill(torch.arange(n_tokens) >= target_lengths[:, None], filling)
    losses = pruned_loss(logits.gather(2, band[..., None].expand(-1, -1, -1, 5)), filled, band, lengths, target_lengths, blank=1)
    for i, (t, u) in enumerate(sizes):
        truth = loss_by_paths(logits[i].log_softmax(dim=-1), targets[i, :u].tolist(), band[i, :t], 1)
        assert losses[i].item() == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fast_emit", [0.0, 0.5])
def test_gradient_inside_the_band_is_that_of_the_full_lattice_with_forbidden_nodes(overwrite, fast_emit):
    """Autograd through a table of the whole lattice, minus infinity outside the band."""
    used_symbol, used_blank, lengths, target_lengths = posteriors(3, [(20, 9), (17, 4), (6, 9)])
    band = pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=4)
    targets = torch.randint(1, 6, (3, 9), generator=torch.Generator().manual_seed(0))
    x, y = ((2 * noise(1, 3, 20, band.shape[2], 6)).requires_grad_() for _ in range(2))
    losses = pruned_loss(x * 1.0, targets, band, lengths, target_lengths, blank=0, fast_emit=fast_emit, overwrite_logits=overwrite)
    lp = y.log_softmax(dim=-1)
    symbol, blank = torch.full((3, 20, 10), -math.inf, dtype=torch.float64), torch.full((3, 20, 10), -math.inf, dtype=torch.float64)
    next_symbol = F.pad(targets, (0, 1))[:, None].expand(-1, 20, -1).gather(2, band)
    symbol = symbol.scatter(2, band, lp.gather(3, next_symbol[..., None])[..., 0])[:, :, :9]
    log_p = lattice_log_prob(symbol, blank.scatter(2, band, lp[..., 0]), lengths, target_lengths, fast_emit=fast_emit)
    assert torch.allclose(losses, -log_p, atol=1e-12)
    weights = tensor([1, 2, 3])
    assert torch.allclose(torch.autograd.grad((losses * weights).sum(), x)[0], torch.autograd.grad((-log_p * weights).sum(), y)[0], atol=1e-12)


def test_rows_of_adds_up_the_gradients_of_a_row():
    x = noise(0, 2, 4, 3).requires_grad_()
    band = tensor([[[0, 1], [1, 2], [1, 2]], [[0, 1], [0, 1], [2, 3]]])
    kept = rows_of(x, band)
    assert all(torch.equal(kept[i, t, r], x[i, band[i, t, r]]) for i, t, r in itertools.product(range(2), range(3), range(2)))
    counts = torch.autograd.grad(kept.sum(), x)[0][:, :, 0]
    assert counts.tolist() == [[1, 3, 2, 0], [2, 2, 1, 1]]


def test_errors_of_the_pruned_loss():
    band = torch.arange(3).expand(2, 5, -1)
    arguments = {"logits": torch.zeros(2, 5, 3, 6), "targets": tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), "band": band, "lengths": tensor([5, 5]), "target_lengths": tensor([2, 2])}
    call = lambda blank=0, **change: pruned_loss(*(arguments | change).values(), blank=blank)  # noqa: E731
    assert call().isfinite().all()
    with pytest.raises(ArithmeticError, match=r"the pruned loss of utterance 1 is inf: NaN in its logits, or a band that no path gets through \(was it made for these lengths\?\)"):
        call(target_lengths=tensor([2, 4]))
    with pytest.raises(ArithmeticError, match="the pruned loss of utterance 0 is nan"):
        call(logits=torch.full((2, 5, 3, 6), math.nan))
    with pytest.raises(ValueError, match="lengths of utterance 1 is 6"):
        call(lengths=tensor([5, 6]))
    with pytest.raises(ValueError, match="target 0 has symbol 3 at place 2; expected 0 to 5, and not the blank"):
        call(blank=3, target_lengths=tensor([3, 2]))


# ---- both losses together -------------------------------------------------------------------------------------------


def model(seed=0, vocab=9, dtype=torch.float64):
    torch.manual_seed(seed)
    parts = {"decoder": Decoder(vocab, 8, 0, 2), "joiner": Joiner(10, 8, 6, vocab), "simple_am_proj": nn.Linear(10, vocab), "simple_lm_proj": nn.Linear(8, vocab)}
    return nn.ModuleDict(parts).to(dtype)


CASE = torch.randint(1, 9, (3, 7), generator=torch.Generator().manual_seed(2)), torch.tensor([18, 11, 14]), torch.tensor([7, 3, 5])


def test_with_all_rows_both_losses_are_full_lattices():
    parts, sound = model(), noise(0, 3, 18, 10)
    simple, pruned = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=8, lm_scale=0.0)
    rows = parts["decoder"](F.pad(CASE[0], (1, 0)))
    assert torch.allclose(pruned, transducer_loss(parts["joiner"](sound[:, :, None], rows[:, None]), *CASE, blank=0))
    assert torch.allclose(simple, transducer_loss(parts["simple_am_proj"](sound)[:, :, None] + parts["simple_lm_proj"](rows)[:, None], *CASE, blank=0))
    fewer = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=4)[1]
    assert (fewer[[0, 2]] > pruned[[0, 2]]).all() and torch.isclose(fewer[1], pruned[1])  # the second text has four rows in all


def test_gradients_of_all_parts_without_overwriting():
    """The band is taken as given; everything else goes through autograd, on fresh memory."""
    sound = noise(0, 3, 18, 10)
    ours, plain = model(), model()
    simple, pruned = pruned_transducer_losses(sound, *CASE, **ours, blank=0, n_rows=4, fast_emit=0.1)
    (0.5 * simple + pruned).sum().backward()
    rows = plain["decoder"](F.pad(CASE[0], (1, 0)))
    arcs = simple_arcs(plain["simple_am_proj"](sound), plain["simple_lm_proj"](rows), CASE[0], blank=0)
    _, *used = arc_posteriors(*arcs, *CASE[1:])
    band = pruning_band(*used, *CASE[1:], n_rows=4)
    logits = plain["joiner"](sound[:, :, None].expand(-1, -1, 4, -1), rows_of(rows, band))
    expected = 0.5 * -lattice_log_prob(*arcs, *CASE[1:], fast_emit=0.1) + pruned_loss(logits, CASE[0], band, *CASE[1:], blank=0, fast_emit=0.1)
    expected.sum().backward()
    assert torch.allclose(0.5 * simple + pruned, expected)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-10) and p.grad.abs().max() > 0, name


def test_the_gradient_is_written_over_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        """Counts new tensors of the size of the logits."""

        def __init__(self, numel):
            super().__init__()
            self.numel, self.kept = numel, {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= 4 * self.numel:
                self.kept[out.untyped_storage().data_ptr()] = out.untyped_storage()  # kept, so that no address is used twice
            return out

    parts, sound = model(vocab=150, dtype=torch.float32), noise(0, 3, 60, 10, dtype=torch.float32)
    targets, target_lengths = CASE[0], CASE[2]
    with Large(3 * 60 * 4 * 150) as forward:
        _, pruned = pruned_transducer_losses(sound, targets, tensor([60, 51, 54]), target_lengths, **parts, blank=0, n_rows=4)
    with Large(3 * 60 * 4 * 150) as backward:
        pruned.sum().backward()
    assert len(forward.kept) == 1 and set(backward.kept) <= set(forward.kept)


def test_padding_and_batch_mates_change_nothing():
    parts, sound = model(), noise(0, 3, 18, 10)
    together = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=4)
    targets, lengths, target_lengths = CASE
    garbled, other = targets.clone(), sound.clone()
    for i, (t, u) in enumerate(zip(lengths.tolist(), target_lengths.tolist())):
        alone = pruned_transducer_losses(sound[i : i + 1, :t], targets[i : i + 1, :u], lengths[i : i + 1], target_lengths[i : i + 1], **parts, blank=0, n_rows=4)
        for a, b in zip(together, alone):
            assert a[i].item() == pytest.approx(b.item(), abs=1e-10)
        garbled[i, u:], other[i, t:] = (-1, 0, 99)[i], 100 * noise(i, 1, 10)
    for a, b in zip(together, pruned_transducer_losses(other, garbled, lengths, target_lengths, **parts, blank=0, n_rows=4)):
        assert torch.equal(a, b)


def test_with_am_scale_the_simple_loss_averages_over_padding_and_batch_mates_as_documented():
    parts, sound = model(), noise(0, 3, 18, 10)
    targets, lengths, target_lengths = CASE
    t, u = int(lengths[1]), int(target_lengths[1])
    assert t < sound.shape[1] and u < targets.shape[1]  # so that cutting the padding off changes something
    for am_scale, depends in ((0.0, False), (0.2, True)):
        together = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=4, am_scale=am_scale)[0][1]
        alone = pruned_transducer_losses(sound[1:2, :t], targets[1:2, :u], lengths[1:2], target_lengths[1:2], **parts, blank=0, n_rows=4, am_scale=am_scale)[0][0]
        padded = pruned_transducer_losses(sound[1:2], targets[1:2], lengths[1:2], target_lengths[1:2], **parts, blank=0, n_rows=4, am_scale=am_scale)[0][0]
        assert (abs(together.item() - alone.item()) > 1e-4) == depends, am_scale  # batch mates
        assert (abs(padded.item() - alone.item()) > 1e-4) == depends, am_scale  # padding


def test_rows_are_raised_for_the_whole_batch():
    sizes = [(9, 4), (2, 8)]  # eight symbols in two steps need five rows
    used_symbol, used_blank, lengths, target_lengths = posteriors(3, sizes)
    assert pruning_band(used_symbol, used_blank, lengths, target_lengths, n_rows=3).shape[2] == 5
    easy = posteriors(3, [(9, 4), (9, 8)])
    assert pruning_band(*easy, n_rows=3).shape[2] == 3


def test_sixteen_bit_training_stays_close():
    """Under autocast only the linear layers are coarse: both losses, and the gradient as a whole, stay within two per cent."""
    sound = 3 * noise(0, 3, 18, 10, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        parts = model(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            simple, pruned = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=8)
        assert simple.dtype == pruned.dtype == torch.float32
        (simple + pruned).sum().backward()
        results.append((simple.detach(), pruned.detach(), torch.cat([p.grad.flatten() for p in parts.parameters()])))
    (s, p, g), (s16, p16, g16) = results
    assert torch.allclose(s, s16, rtol=0.01) and torch.allclose(p, p16, rtol=0.01) and (g - g16).norm() < 0.02 * g.norm()


def test_autocast_leaves_the_simple_lattice_in_32_bits():
    """Only the scores are coarse: what is computed from them is what 32 bits give."""
    parts, sound = model(dtype=torch.float32), 3 * noise(0, 3, 18, 10, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        simple, _ = pruned_transducer_losses(sound, *CASE, **parts, blank=0, n_rows=8)
        am, lm = parts["simple_am_proj"](sound), parts["simple_lm_proj"](parts["decoder"](F.pad(CASE[0], (1, 0))))
    assert am.dtype == lm.dtype == torch.bfloat16
    assert torch.allclose(simple, -lattice_log_prob(*simple_arcs(am, lm, CASE[0], blank=0), *CASE[1:]), rtol=1e-6)


def test_errors_come_before_the_decoder_sees_wrong_symbols():
    parts, sound = model(), noise(0, 3, 18, 10)
    targets, lengths, target_lengths = CASE
    wrong = targets.clone()
    wrong[1, 2] = 9
    with pytest.raises(ValueError, match="target 1 has symbol 9 at place 2; expected 0 to 8"):
        pruned_transducer_losses(sound, wrong, lengths, target_lengths, **parts, blank=0)
    with pytest.raises(ValueError, match="n_rows is 1"):
        pruned_transducer_losses(sound, targets, lengths, target_lengths, **parts, blank=0, n_rows=1)
    with pytest.raises(ValueError, match="lengths of utterance 0 is 18; it must lie between 1 and 17"):
        pruned_transducer_losses(sound[:, :17], targets, lengths, target_lengths, **parts, blank=0)


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [(0, {}, (1.0, 0.1)), (500, {}, (0.875, 0.325)), (2000, {}, (0.5, 1.0)), (10**7, {}, (0.5, 1.0)), (1, {"warm_steps": 1}, (0.5, 1.0)), (5, {"warm_steps": 10, "simple_scale": 0.0}, (0.5, 0.55))],
)
def test_loss_scales_by_hand(step, options, expected):
    assert loss_scales(step, **options) == pytest.approx(expected)
