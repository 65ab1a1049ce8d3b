"""Bypass, down- and upsampling, combiners: against loops, by statistics with a seed, and by what their gradients do."""
import copy
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.zipformer.resampling import AttentionCombine, AttentionDownsample, BypassModule, FirstSimpleUpsample, SimpleCombiner, SimpleDownsample, SimpleUpsample
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import randn


def lively(module, seed=0):
    """In float64, with parameters of size 1, in evaluation."""
    module = module.double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 * seed + i + 50))
    return module


def always(monkeypatch, draw):
    count = []
    monkeypatch.setattr(random, "random", lambda: count.append(draw) or draw)
    return count


def windows_by_hand(x, size):
    """A list of windows, each a list of frames; frames after the end are the last one."""
    return [[x[min(start + i, len(x) - 1)] for i in range(size)] for start in range(0, len(x), size)]


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


class TestSimpleDownsample:
    @pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
    def test_every_length_against_a_loop(self, factor):
        module = lively(SimpleDownsample(3, factor))
        weights = [math.exp(b) for b in module.bias.tolist()]
        weights = [w / sum(weights) for w in weights]
        for n_frames in range(1, 41):
            x = randn(n_frames, 2, 3, seed=n_frames)
            out = module(x)
            expected = [sum(w * frame for w, frame in zip(weights, window, strict=True)) for window in windows_by_hand(x, factor)]
            assert len(out) == len(expected) == math.ceil(n_frames / factor)
            torch.testing.assert_close(out, torch.stack(expected))

    def test_starts_as_the_mean(self):
        x = randn(8, 2, 3)
        torch.testing.assert_close(SimpleDownsample(3, 4)(x), torch.stack([x[:4].mean(dim=0), x[4:].mean(dim=0)]))

    def test_large_biases_pick_a_frame(self):
        module, x = SimpleDownsample(3, 4).double(), randn(8, 2, 3)
        with torch.no_grad():
            module.bias[2] = 1000.0
        assert torch.equal(module(x), x[2::4])

    @pytest.mark.parametrize("n_frames, factor", [(5, 2), (4, 4), (1, 3)])
    def test_gradcheck(self, n_frames, factor):
        module = lively(SimpleDownsample(2, factor))
        assert torch.autograd.gradcheck(lambda x, _: module(x), (randn(n_frames, 2, 2).requires_grad_(), module.bias))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 30), st.integers(0, 12), st.integers(1, 8), st.integers(0, 1000))
    def test_padding_leaks_into_one_low_frame_at_most(self, length, n_padding, factor, seed):
        module, x = lively(SimpleDownsample(2, factor)), randn(length + n_padding, 1, 2, seed=seed)
        other = x.clone()
        other[length:] = randn(n_padding, 1, 2, seed=seed + 1, scale=100)
        changed = (module(x) != module(other)).flatten(start_dim=1).any(dim=1)
        assert not changed[: length // factor].any()
        first = length // factor  # the window in which padding begins
        assert changed[first:].all() or n_padding == 0

    def test_what_is_stored(self):
        assert shapes(SimpleDownsample(256, 8)) == {"bias": (8,)} and not SimpleDownsample(256, 8).bias.any()

    @pytest.mark.parametrize("factor", [0, -1])
    def test_refused(self, factor):
        with pytest.raises(ValueError, match=f"downsample is {factor}; a window holds at least one frame"):
            SimpleDownsample(3, factor)


class TestSimpleUpsample:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 8))
    def test_every_frame_so_many_times(self, n_frames, factor):
        x = randn(n_frames, 2, 3)
        out = SimpleUpsample(3, factor)(x)
        assert len(out) == n_frames * factor and all(torch.equal(out[t], x[t // factor]) for t in range(len(out)))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 1000))
    def test_down_after_up_is_nothing(self, n_frames, factor, seed):
        x = randn(n_frames, 2, 3, seed=seed)
        torch.testing.assert_close(lively(SimpleDownsample(3, factor), seed)(SimpleUpsample(3, factor)(x)), x)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 8))
    def test_up_after_down_is_long_enough(self, n_frames, factor):
        x = randn(n_frames, 1, 2)
        there_and_back = SimpleUpsample(2, factor)(SimpleDownsample(2, factor).double()(x))
        assert n_frames <= len(there_and_back) < n_frames + factor

    def test_gradient_is_the_sum_over_the_window(self):
        x, g = randn(4, 2, 3).requires_grad_(), randn(12, 2, 3, seed=1)
        SimpleUpsample(3, 3)(x).backward(g)
        torch.testing.assert_close(x.grad, g[0::3] + g[1::3] + g[2::3])

    def test_nothing_stored(self):
        assert not SimpleUpsample(3, 2).state_dict()

    def test_refused(self):
        with pytest.raises(ValueError, match="upsample is 0"):
            SimpleUpsample(3, 0)


class TestBypass:
    def make(self, scales=(0.25, 0.5, 1.0), **settings):
        module = BypassModule(len(scales), **settings).double()
        with torch.no_grad():
            module.bypass_scale.copy_(torch.tensor(scales))
        return module

    def test_part_of_the_way(self):
        src_orig, src = randn(5, 2, 3), randn(5, 2, 3, seed=1)
        out = self.make().eval()(src_orig, src)
        for channel, c in enumerate((0.25, 0.5, 1.0)):
            torch.testing.assert_close(out[..., channel], (1 - c) * src_orig[..., channel] + c * src[..., channel])

    def test_ends(self):
        src_orig, src = randn(5, 2, 3), randn(5, 2, 3, seed=1)
        assert torch.equal(self.make((0.0,) * 3).eval()(src_orig, src), src_orig)
        torch.testing.assert_close(self.make((1.0,) * 3).eval()(src_orig, src), src)

    def test_starts_half_way(self):
        assert shapes(BypassModule(192)) == {"bypass_scale": (192,)} and (BypassModule(192).bypass_scale == 0.5).all()

    def test_gradcheck(self):
        module = self.make().eval()
        assert torch.autograd.gradcheck(lambda a, b, _: module(a, b), (randn(3, 2, 3).requires_grad_(), randn(3, 2, 3, seed=1).requires_grad_(), module.bypass_scale))

    @pytest.mark.parametrize("skip, straight", [(0.3, 0.0), (0.0, 0.2), (0.4, 0.25), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    def test_how_often_an_utterance_skips_or_goes_straight_through(self, skip, straight):
        torch.manual_seed(0)
        module, n = self.make((0.25, 0.5, 0.75), skip_rate=skip, straight_through_rate=straight).train(), 20_000
        out = module(torch.zeros(2, n, 3, dtype=torch.float64), torch.ones(2, n, 3, dtype=torch.float64)).detach()
        assert torch.equal(out[0], out[1]), "one draw for all frames of an utterance"
        seen = Counter(tuple(row) for row in out[0].tolist())
        expected = {(1.0,) * 3: straight, (0.0,) * 3: (1 - straight) * skip, (0.25, 0.5, 0.75): (1 - straight) * (1 - skip)}
        assert sum(seen.values()) == sum(seen[row] for row in expected)
        for row, p in expected.items():
            assert seen[row] / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n) + 1e-12)

    def test_gradient_of_skipped_utterances(self):
        torch.manual_seed(3)
        module = self.make(skip_rate=0.5, scale_min=0.0).train()
        src_orig, src = randn(2, 50, 3).requires_grad_(), randn(2, 50, 3, seed=1).requires_grad_()
        out = module(src_orig, src)
        out.sum().backward()
        skipped = (out == src_orig).flatten(start_dim=2).all(dim=2).all(dim=0)
        assert 5 < skipped.sum() < 45
        assert (src.grad[:, skipped] == 0).all() and (src_orig.grad[:, skipped] == 1).all() and (src.grad[:, ~skipped] != 0).all()
        torch.testing.assert_close(module.bypass_scale.grad, (src - src_orig)[:, ~skipped].sum(dim=(0, 1)))

    def test_limits_turn_gradients_round(self, monkeypatch):
        """Below 0.4 a gradient may not push down, above 0.8 not up. A positive gradient pushes down."""
        scales, way = (0.3, 0.3, 0.6, 0.6, 0.9, 0.9), torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0], dtype=torch.float64)
        for training, draw, expected in ((True, 0.599, [-1.0, -2.0, 3.0, -4.0, 5.0, 6.0]), (True, 0.6, way.tolist()), (False, 0.0, way.tolist())):
            module = self.make(scales, scale_min=0.4, scale_max=0.8).train(training)
            always(monkeypatch, draw)
            out = module(torch.zeros(1, 1, 6, dtype=torch.float64), way[None, None])
            torch.testing.assert_close(out[0, 0], torch.tensor(scales, dtype=torch.float64) * way)  # never clamped
            out.sum().backward()
            assert module.bypass_scale.grad.tolist() == expected

    def test_limits_follow_their_schedule(self, monkeypatch):
        module = self.make((0.5,)).train()
        always(monkeypatch, 0.0)
        for batch_count, expected in ((None, 1.0), (0, -1.0), (11_000, -1.0), (12_000, 1.0), (20_000, 1.0)):  # from 0.9 at 0 to 0.2 at 20,000: 0.48 at 12,000
            if batch_count is not None:
                set_batch_count(module, batch_count)
            module.bypass_scale.grad = None
            module(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)).sum().backward()
            assert module.bypass_scale.grad.item() == expected

    def test_evaluation_draws_nothing(self, monkeypatch):
        module, count, state = self.make(skip_rate=0.5, straight_through_rate=0.5).eval(), always(monkeypatch, 0.0), torch.get_rng_state()
        x, y = randn(5, 4, 3), randn(5, 4, 3, seed=1)
        assert torch.equal(module(x, y), module(x, y)) and not count and torch.equal(torch.get_rng_state(), state)

    def test_rates_of_zero_draw_no_masks(self):
        module, state = self.make(skip_rate=ScheduledFloat((0, 0.5), (10, 0.0), default=0.0)).train(), torch.get_rng_state()
        set_batch_count(module, 10)
        module(randn(5, 4, 3), randn(5, 4, 3))
        assert torch.equal(torch.get_rng_state(), state)

    def test_each_module_has_its_own_clock(self):
        given = {name: ScheduledFloat((0, 0.5), (10, 0.25), default=0.125) for name in ("skip_rate", "straight_through_rate", "scale_min", "scale_max")}
        first, second, usual, other = BypassModule(3, **given).train(), BypassModule(3, **given).train(), BypassModule(3).train(), BypassModule(3).train()
        set_batch_count(first, 0)
        set_batch_count(usual, 0)
        for name, schedule in given.items():
            assert float(getattr(first, name)) == 0.5 and float(getattr(second, name)) == 0.125 and schedule.batch_count is None
        assert float(usual.scale_min) == 0.9 and float(other.scale_min) == 0.0
        twin = copy.deepcopy(first)
        set_batch_count(twin, 10)
        assert float(twin.skip_rate) == 0.25 and float(first.skip_rate) == 0.5


class TestAttentionDownsample:
    @pytest.mark.parametrize("in_channels, out_channels", [(3, 3), (3, 5)])
    @pytest.mark.parametrize("factor", [1, 2, 3, 4])
    def test_against_a_loop(self, in_channels, out_channels, factor):
        module = lively(AttentionDownsample(in_channels, out_channels, factor))
        for n_frames in range(1, 14):
            x, rows = randn(n_frames, 2, in_channels, seed=n_frames), []
            for window in windows_by_hand(x, factor):
                for n in range(2):
                    frames = [frame[n].tolist() for frame in window]
                    weights = [math.exp(sum(a * b for a, b in zip(frame, module.query.tolist(), strict=True))) for frame in frames]
                    row = [sum(w * frame[c] for w, frame in zip(weights, frames, strict=True)) / sum(weights) for c in range(in_channels)]
                    line = sum(frames, [])
                    row += [sum(a * b for a, b in zip(column, line, strict=True)) for column in (module.extra_proj.weight.tolist() if module.extra_proj else [])]
                    rows.append(row)
            expected = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2, out_channels)
            for training in (True, False):
                torch.testing.assert_close(module.train(training)(x), expected)

    def test_query_of_zeros_is_the_mean(self):
        module, x = AttentionDownsample(3, 3, 4).double(), randn(10, 2, 3)
        torch.nn.init.zeros_(module.query)
        torch.testing.assert_close(module(x), SimpleDownsample(3, 4).double()(x))

    def test_gradcheck(self):
        module = lively(AttentionDownsample(2, 3, 2))
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (randn(5, 2, 2).requires_grad_(), *module.parameters()))

    def test_penalty_of_large_scores(self):
        """Scores 20, −15, 5 and 10: the first two are beyond 10. A gradient of zeros shows the penalty alone."""
        module, x = AttentionDownsample(2, 2, 4).double(), torch.tensor([[20.0, 1.0], [-15.0, 2.0], [5.0, 3.0], [10.0, 4.0]], dtype=torch.float64)[:, None]
        for training, acts, factor in ((True, False, 1e-4), (False, False, 0.0), (False, True, 1e-4), (True, True, 1e-4)):
            module.train(training).acts_in_evaluation = acts
            module.query = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
            leaf = x.clone().requires_grad_()
            (module(leaf) * 0).sum().backward()
            torch.testing.assert_close(module.query.grad, factor * (x[0, 0] - x[1, 0]))
            torch.testing.assert_close(leaf.grad[:, 0, 0], factor * torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64))

    def test_stays_quiet_by_default(self):
        assert AttentionDownsample(3, 4, 2).acts_in_evaluation is False

    def test_start_and_state(self):
        torch.manual_seed(0)
        module = AttentionDownsample(400, 500, 2)
        assert module.query.std().item() == pytest.approx(0.05, rel=0.1)
        assert shapes(module) == {"query": (400,), "extra_proj.weight": (100, 800)} and shapes(AttentionDownsample(4, 4, 2)) == {"query": (4,)}

    @pytest.mark.parametrize("arguments, message", [((4, 3, 2), r"out_channels \(3\) is less than in_channels \(4\)"), ((3, 3, 0), "downsample is 0")])
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AttentionDownsample(*arguments)


class TestFirstSimpleUpsample:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
    def test_against_a_loop(self, n_frames, batch, factor):
        module, x = lively(FirstSimpleUpsample(4, factor)), randn(n_frames, batch, 4)
        out = module(x)
        assert out.shape == (n_frames * factor, batch, 4)
        for t in range(len(out)):
            torch.testing.assert_close(out[t], x[t // factor] + module.bias[t % factor])

    def test_gradients_are_sums(self):
        module, x, g = lively(FirstSimpleUpsample(3, 2)), randn(4, 2, 3).requires_grad_(), randn(8, 2, 3, seed=1)
        module(x).backward(g)
        torch.testing.assert_close(x.grad, g[0::2] + g[1::2])
        torch.testing.assert_close(module.bias.grad, torch.stack([g[0::2].sum(dim=(0, 1)), g[1::2].sum(dim=(0, 1))]))

    def test_start_and_refused(self):
        torch.manual_seed(0)
        module = FirstSimpleUpsample(500, 4)
        assert shapes(module) == {"bias": (4, 500)} and module.bias.std().item() == pytest.approx(0.01, rel=0.1)
        with pytest.raises(ValueError, match="upsample is 0"):
            FirstSimpleUpsample(3, 0)


class TestSimpleCombiner:
    def make(self, weight, *arguments):
        module = SimpleCombiner(*arguments).double()
        torch.nn.init.constant_(module.weight1, weight)
        return module

    @settings(max_examples=30, deadline=None)
    @given(st.floats(-2, 2), st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(1, 3), max_size=3))
    def test_formula(self, weight, dim1, more, frames):
        a, b = randn(*frames, dim1), randn(*frames, dim1 + more, seed=1)
        out = self.make(weight, dim1, dim1 + more).eval()(a, b)
        torch.testing.assert_close(out[..., :dim1], weight * a + (1 - weight) * b[..., :dim1])
        torch.testing.assert_close(out[..., dim1:], (1 - weight) * b[..., dim1:])

    def test_starts_with_the_second_alone(self):
        b = randn(5, 2, 4, seed=1)
        module = SimpleCombiner(3, 4)
        assert torch.equal(module.double().eval()(randn(5, 2, 3), b), b) and shapes(module) == {"weight1": ()}

    @pytest.mark.parametrize("dims", [(3, 5), (4, 4), (5, 4), (3, 3)])
    def test_wrong_widths(self, dims):
        with pytest.raises(ValueError, match=f"expected inputs of 3 and 4 channels, got {dims[0]} and {dims[1]}"):
            SimpleCombiner(3, 4)(torch.zeros(2, 1, dims[0]), torch.zeros(2, 1, dims[1]))

    def test_never_throws_channels_away(self):
        with pytest.raises(ValueError, match=r"dim2 \(3\) is less than dim1 \(4\)"):
            SimpleCombiner(4, 3)

    @pytest.mark.parametrize(
        "weight, clamped, is_free", [(0.9, 0.75, False), (0.05, 0.1, False), (0.5, 0.5, True), (-3.0, 0.1, False)]
    )
    def test_clamped_in_a_quarter_of_the_calls(self, monkeypatch, weight, clamped, is_free):
        module, a, b = self.make(weight, 2, 2, (0.1, 0.25)), randn(3, 2, 2), randn(3, 2, 2, seed=1)
        for training, draw in ((True, 0.249), (True, 0.25), (False, 0.0)):
            always(monkeypatch, draw)
            module.train(training).weight1.grad = None
            out = module(a, b)
            out.sum().backward()
            acts = training and draw < 0.25
            used = clamped if acts else weight
            torch.testing.assert_close(out, used * a + (1 - used) * b)
            torch.testing.assert_close(module.weight1.grad, (a - b).sum() * (is_free or not acts))

    def test_no_least_weight(self, monkeypatch):
        always(monkeypatch, 0.0)
        a, b = randn(3, 2, 2), randn(3, 2, 2, seed=1)
        torch.testing.assert_close(self.make(5.0, 2, 2).train()(a, b), 5 * a - 4 * b)

    def test_gradcheck(self):
        module = self.make(0.3, 2, 3).eval()
        assert torch.autograd.gradcheck(lambda a, b, _: module(a, b), (randn(3, 2, 2).requires_grad_(), randn(3, 2, 3).requires_grad_(), module.weight1))


class TestAttentionCombine:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 1000))
    def test_against_a_loop(self, n_inputs, channels, frames, seed):
        module, inputs = lively(AttentionCombine(channels, n_inputs), seed), [randn(*frames, channels, seed=seed + i) for i in range(n_inputs)]
        out = module(inputs)
        assert out.shape == inputs[0].shape
        for row, *parts in zip(out.reshape(-1, channels), *[x.reshape(-1, channels) for x in inputs], strict=True):
            exp = [math.exp((part @ module.weight[:, i] + module.bias[i]).item()) for i, part in enumerate(parts)]
            torch.testing.assert_close(row, sum(e * part for e, part in zip(exp, parts, strict=True)) / sum(exp))

    def test_starts_as_the_mean_in_evaluation(self):
        inputs = [randn(5, 2, 3, seed=i) for i in range(4)]
        torch.testing.assert_close(AttentionCombine(3, 4).double().eval()(inputs), sum(inputs) / 4)

    @pytest.mark.parametrize("n_inputs, random_prob, single_prob", [(3, 0.25, 0.333), (4, 0.5, 0.5), (2, 0.25, 0.0), (3, 1.0, 1.0), (1, 0.25, 0.5), (1, 1.0, 0.5), (5, 0.7, 0.2)])
    def test_which_inputs_a_frame_may_use(self, n_inputs, random_prob, single_prob):
        """Inputs are unit vectors, so the output shows the weights; `start` is uniform from 1 to below n / random_prob."""
        torch.manual_seed(0)
        module, n = AttentionCombine(n_inputs, n_inputs, random_prob, single_prob).double().train(), 30_000
        with torch.no_grad():
            out = module([torch.eye(n_inputs, dtype=torch.float64)[i].expand(n, n_inputs) for i in range(n_inputs)])
        seen = Counter(tuple(row) for row in (out > 0).tolist())
        starts = range(1, int(n_inputs / random_prob)) or [1]  # one input alone: nothing to leave out
        expected = Counter()
        for start in starts:
            first = tuple(i < start for i in range(n_inputs))
            only = tuple(i == start - 1 for i in range(n_inputs))
            p = single_prob if start < n_inputs else 0.0
            expected[first] += (1 - p) / len(starts)
            expected[only] += p / len(starts)
        assert set(seen) <= {row for row, p in expected.items() if p > 0}
        for row, p in expected.items():
            assert seen[row] / n == pytest.approx(p, abs=5 * math.sqrt(max(p * (1 - p), 0) / n) + 1e-9)
        allowed = (out > 0).sum(dim=1, keepdim=True)
        torch.testing.assert_close(out, (out > 0).double() / allowed)

    def test_hidden_inputs_get_no_gradient(self, monkeypatch):
        always(monkeypatch, 0.9)  # no penalty: it would reach hidden scores, too
        torch.manual_seed(0)
        module = lively(AttentionCombine(3, 3, 1.0, 1.0)).train()  # start is 1 or 2: one input alone
        inputs = [randn(200, 3, seed=i).requires_grad_() for i in range(3)]
        out = module(inputs)
        out.sum().backward()
        chosen = torch.stack([(out == x).all(dim=1) for x in inputs])
        assert (chosen.sum(dim=0) == 1).all() and not chosen[2].any() and 50 < chosen[0].sum() < 150
        for x, mine in zip(inputs, chosen, strict=True):
            assert (x.grad[mine] == 1).all() and (x.grad[~mine] == 0).all()

    def test_penalty_of_large_scores_in_a_tenth_of_the_calls(self, monkeypatch):
        torch.manual_seed(0)
        x = [torch.tensor([[20.0], [5.0]], dtype=torch.float64), torch.tensor([[-30.0], [-10.0]], dtype=torch.float64)]
        for training, draw, factor in ((True, 0.0999, 1e-4), (True, 0.1, 0.0), (False, 0.0, 0.0)):
            always(monkeypatch, draw)
            module = AttentionCombine(1, 2).double().train(training)
            torch.nn.init.ones_(module.weight)
            (module(x) * 0).sum().backward()
            torch.testing.assert_close(module.bias.grad, factor * torch.tensor([1.0, -1.0], dtype=torch.float64))
            torch.testing.assert_close(module.weight.grad, factor * torch.tensor([[20.0, 30.0]], dtype=torch.float64))

    def test_gradcheck(self):
        module = lively(AttentionCombine(2, 3))
        assert torch.autograd.gradcheck(lambda a, b, c, *_: module([a, b, c]), (*[randn(3, 2, seed=i).requires_grad_() for i in range(3)], *module.parameters()))

    def test_evaluation_draws_nothing(self, monkeypatch):
        module, count, state = AttentionCombine(3, 2).double().eval(), always(monkeypatch, 0.0), torch.get_rng_state()
        inputs = [randn(5, 3), randn(5, 3, seed=1)]
        assert torch.equal(module(inputs), module(inputs)) and not count and torch.equal(torch.get_rng_state(), state)

    def test_what_is_stored(self):
        module = AttentionCombine(5, 3)
        assert shapes(module) == {"weight": (5, 3), "bias": (3,)} and not module.weight.any() and not module.bias.any()

    @pytest.mark.parametrize(
        "arguments, message",
        [((3, 0), r"num_inputs \(0\) must be 1 or more"), ((3, 2, 0.0), r"random_prob \(0.0\) in \(0, 1\]"), ((3, 2, 1.5), r"random_prob \(1.5\)"), ((3, 2, 0.5, -0.1), r"single_prob \(-0.1\)"), ((3, 2, 0.5, 1.1), r"single_prob \(1.1\)")],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AttentionCombine(*arguments)

    def test_wrong_number_of_inputs(self):
        with pytest.raises(ValueError, match="expected 3 inputs, got 2"):
            AttentionCombine(3, 3)([torch.zeros(4, 3)] * 2)
