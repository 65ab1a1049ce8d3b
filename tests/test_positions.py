"""Positions: numbers by hand, rotations as complex multiplication, and what depends on distances alone."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.transformer.attention import Attention, KeyValueCache, causal_mask
from speechlearn.transformer.positions import (
    LearnedPositions, NoPositions, RelativePositionBias, RotaryPositions, SinusoidalPositions, relative_distances, rotate_pairs, sinusoidal_table,
)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestSinusoidal:
    def test_by_hand(self):
        table = sinusoidal_table(3, 4)
        assert table[0].tolist() == [0, 1, 0, 1]
        assert table[2].tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)], abs=1e-7)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 500), st.integers(0, 200), st.sampled_from([2, 8, 30]))
    def test_an_offset_is_a_rotation(self, t, k, d_model):
        here, there = sinusoidal_table(1, d_model, start=t)[0].double(), sinusoidal_table(1, d_model, start=t + k)[0].double()
        # cos + i·sin of each pair: going on by k multiplies by the same complex number everywhere
        as_complex = lambda row: torch.complex(row[1::2], row[0::2])  # noqa: E731
        turned = as_complex(here) * torch.exp(1j * k * 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model))
        assert torch.allclose(turned, as_complex(there), atol=1e-5)

    def test_dot_products_depend_on_the_distance(self):
        table = sinusoidal_table(60, 32)
        products = table @ table.T
        for distance in (0, 1, 7, 30):
            assert torch.allclose(products.diagonal(distance), products[0, distance].expand(60 - distance), atol=1e-4)

    def test_far_positions_are_exact(self):
        t = 100_000
        assert float(sinusoidal_table(1, 4, start=t)[0, 0]) == pytest.approx(math.sin(t), abs=1e-7)
        assert float(sinusoidal_table(1, 4, start=t)[0, 2]) == pytest.approx(math.sin(t * 0.01), abs=1e-7)

    def test_module_adds_rows_and_grows(self):
        module = SinusoidalPositions(6)
        x = noise(2, 300, 6)
        assert torch.allclose(module(x), x + sinusoidal_table(300, 6), atol=1e-6)
        assert torch.allclose(module(x[:, :4], start=700), x[:, :4] + sinusoidal_table(4, 6, start=700), atol=1e-6)
        assert not module.state_dict()  # length must not decide which checkpoints fit
        assert module(x.half()).dtype == torch.float16

    def test_odd_width(self):
        with pytest.raises(ValueError, match="d_model is 5; sines and cosines come in pairs"):
            sinusoidal_table(3, 5)

    def test_dropout_only_in_training(self):
        module = SinusoidalPositions(8, dropout=0.5)
        x = noise(1, 50, 8)
        assert (module(x) == 0).float().mean() > 0.3
        assert not (module.eval()(x) == 0).any()


class TestLearned:
    def test_rows_are_added_from_the_start(self):
        module = LearnedPositions(10, 4)
        x = noise(3, 4, 4)
        assert torch.equal(module(x, start=5), x + module.table[5:9])

    def test_beyond_the_table(self):
        with pytest.raises(ValueError, match="position 10 has no learned vector: the table ends at 9"):
            LearnedPositions(10, 4)(torch.zeros(1, 4, 4), start=7)

    def test_gradient_reaches_the_rows_that_were_used(self):
        module = LearnedPositions(5, 4)
        module(noise(2, 3, 4)).sum().backward()
        assert module.table.grad[:3].eq(2).all() and not module.table.grad[3:].any()

    def test_none_adds_nothing(self):
        x = noise(2, 3, 4)
        assert NoPositions()(x, start=3) is x


class TestRelative:
    def test_distances(self):
        assert relative_distances(3).tolist() == [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]
        assert torch.equal(relative_distances(2, 5), relative_distances(5)[3:])

    def test_bias_is_looked_up_by_distance_and_clipped(self):
        module = RelativePositionBias(2, 2)
        with torch.no_grad():
            module.table.copy_(torch.tensor([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50]]))
        bias = module(5)
        assert bias.shape == (1, 2, 5, 5)
        for q in range(5):
            for k in range(5):
                assert bias[0, 0, q, k] == 3 + max(-2, min(2, k - q)) and bias[0, 1, q, k] == 10 * bias[0, 0, q, k]

    def test_shifting_changes_nothing(self):
        torch.manual_seed(0)
        attention, relative = Attention(8, 2), RelativePositionBias(2, 3)
        torch.nn.init.normal_(relative.table)
        x = noise(1, 5, 8)
        shifted = torch.cat([torch.zeros(1, 4, 8), x], dim=1)
        mask = relative(9).clone()
        mask[..., :4] = -math.inf  # the four in front are hidden
        assert torch.allclose(attention(shifted, mask=mask)[:, 4:], attention(x, mask=relative(5)), atol=1e-6)

    def test_gradients_count_the_places(self):
        module = RelativePositionBias(1, 1)
        module(4).sum().backward()
        assert module.table.grad.tolist() == [[6, 4, 6]]

    def test_wrong_distance(self):
        with pytest.raises(ValueError, match="max_distance is 0"):
            RelativePositionBias(1, 0)


class TestRotary:
    def test_a_quarter_turn(self):
        x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        turned = rotate_pairs(x, torch.full((1, 2), math.pi / 2))
        assert torch.allclose(turned, torch.tensor([[0.0, 1.0, -2.0, 0.0]]), atol=1e-6)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([2, 6, 16]))
    def test_equals_complex_multiplication(self, start, n, d_head):
        x = noise(2, 3, n, d_head, seed=start, dtype=torch.float64)
        pairs = torch.view_as_complex(x.reshape(2, 3, n, d_head // 2, 2).contiguous())
        angle = torch.arange(start, start + n, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        expected = torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2)
        assert torch.allclose(RotaryPositions(d_head)(x, start=start), expected, atol=1e-10)

    def test_lengths_stay_and_products_depend_on_the_distance(self):
        rotary, q, k = RotaryPositions(8), noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=1)
        assert torch.allclose(rotary(q, start=77).norm(), q.norm(), atol=1e-5)
        products = [float((rotary(q, start=t + 3) * rotary(k, start=t)).sum()) for t in (0, 10, 500, 90_000)]
        assert products == pytest.approx([products[0]] * 4, abs=1e-3)
        assert abs(products[0] - float((q * k).sum())) > 1e-2

    def test_attention_does_not_care_where_a_text_begins(self):
        torch.manual_seed(0)
        attention = Attention(16, 2, rotary=RotaryPositions(8))
        x = noise(1, 5, 16)
        hidden = torch.cat([torch.zeros(1, 7, 16), x], dim=1)
        mask = causal_mask(12)
        mask[:, :7] = False
        assert torch.allclose(attention(hidden, mask=mask)[:, 7:], attention(x, mask=causal_mask(5)), atol=1e-5)

    def test_cache_goes_on_counting(self):
        torch.manual_seed(0)
        attention, cache = Attention(16, 2, rotary=RotaryPositions(8)), KeyValueCache()
        x = noise(2, 6, 16)
        pieces = [attention(x[:, i : i + 1], cache=cache) for i in range(6)]
        assert torch.allclose(torch.cat(pieces, 1), attention(x, mask=causal_mask(6)), atol=1e-6)

    def test_wrong_sizes(self):
        with pytest.raises(ValueError, match="d_head is 3; rotary positions turn pairs"):
            RotaryPositions(3)
        with pytest.raises(ValueError, match="the heads have 4 numbers per position; .* made for d_head=6"):
            RotaryPositions(6)(torch.zeros(1, 1, 2, 4))
