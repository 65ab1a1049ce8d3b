"""Quantisers: nearest entries against brute force, running means by hand, gradients that go around, collapse and its cure, prefixes and rests."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.quantiser import ResidualQuantiser, VectorQuantiser, nearest, perplexity, straight_through


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestNearest:
    @given(n=st.integers(1, 40), entries=st.integers(1, 30), dim=st.integers(1, 9), seed=st.integers(0, 99))
    @settings(deadline=None, max_examples=60)
    def test_brute_force(self, n, entries, dim, seed):
        x, book = noise(n, dim, seed=seed, dtype=torch.float64), noise(entries, dim, seed=seed + 1, dtype=torch.float64)
        distances = torch.stack([torch.stack([(v - e).square().sum() for e in book]) for v in x])
        assert nearest(x, book).tolist() == distances.argmin(dim=1).tolist()

    def test_the_first_of_equally_near_ones_and_any_leading_axes(self):
        book = torch.tensor([[1.0], [-1.0], [1.0]])
        assert nearest(torch.tensor([[[0.0]], [[2.0]]]), book).tolist() == [[0], [0]]


class TestStraightThrough:
    def test_value_and_gradient(self):
        x, q = noise(4, 3).requires_grad_(), noise(4, 3, seed=1).requires_grad_()
        out = straight_through(x, q)
        assert torch.allclose(out, q, atol=1e-6)
        weight = noise(4, 3, seed=2)
        (out * weight).sum().backward()
        assert torch.equal(x.grad, weight) and q.grad is None

    def test_second_use_of_the_gradient(self):
        """With a function of x as entry, autograd's answer is that of the identity, and not of the function."""
        x = noise(5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: straight_through(v, v.detach() * 1.0), x)
        assert torch.equal(torch.autograd.grad(straight_through(x, x.round()).square().sum(), x)[0], 2 * x.round().detach())


class TestRunningMeans:
    def test_by_hand(self):
        q = VectorQuantiser(2, 1, decay=0.5, revive_below=0).train()
        q.codebook[:] = torch.tensor([[4.0], [100.0]])
        q.uses[:], q.sums[:] = 1.0, torch.tensor([[4.0], [100.0]])
        q.started.fill_(True)
        quantised, codes = q(torch.tensor([[5.0], [6.0], [7.0]]))
        assert quantised[:, 0].tolist() == [4, 4, 4] and codes.tolist() == [0, 0, 0], "a step is quantised with the codebook before it"
        assert q.uses.tolist() == [2.0, 0.5] and q.sums[:, 0].tolist() == [11.0, 50.0]
        assert q.codebook[:, 0].tolist() == [5.5, 100.0], "an unused entry stays where it is"
        q(torch.tensor([[98.0]]))
        assert q.uses.tolist() == [1.0, 0.75] and q.codebook[:, 0].tolist() == [5.5, pytest.approx((25 + 49) / 0.75)]

    def test_entries_go_to_the_means_of_what_chose_them(self):
        """Three clouds, three entries: each ends at the mean of its cloud."""
        torch.manual_seed(0)
        centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
        q = VectorQuantiser(3, 2, decay=0.9).train()
        q.start(centres + 1.0)
        q.codebook[:], q.sums[:] = centres + 1.0, centres + 1.0
        for step in range(200):
            q(centres.repeat(20, 1) + 0.1 * noise(60, 2, seed=step))
        assert torch.allclose(q.codebook, centres, atol=0.05)

    def test_a_long_unused_entry_does_not_drift_or_become_nan(self):
        q = VectorQuantiser(2, 1, decay=0.5, revive_below=0).train()
        q.codebook[:] = torch.tensor([[0.0], [100.0]])
        q.uses[:], q.sums[:] = 1.0, torch.tensor([[0.0], [100.0]])
        q.started.fill_(True)
        for _ in range(300):
            q(torch.zeros(4, 1))
        assert q.codebook[:, 0].tolist() == [0.0, 100.0]

    def test_nothing_is_learnt_outside_of_training_and_nothing_has_a_gradient(self):
        q = VectorQuantiser(4, 2).train()
        x = noise(16, 2).requires_grad_()
        quantised, _ = q(x)
        assert not quantised.requires_grad and not list(q.parameters())
        before = copy.deepcopy(q.state_dict())
        q.eval()(noise(16, 2, seed=3))
        assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())

    def test_starts_at_the_data(self):
        torch.manual_seed(0)
        x = noise(50, 3) + 100
        q = VectorQuantiser(8, 3, decay=0.0, revive_below=0).train()
        q.start(x)
        assert all((x == entry).all(dim=1).any() for entry in q.codebook)

    @pytest.mark.parametrize("settings", [dict(codebook_size=1), dict(dim=0), dict(decay=1.0), dict(revive_below=-1), dict(revive_below=math.nan)])
    def test_refuses_settings_that_cannot_work(self, settings):
        with pytest.raises(ValueError, match="a codebook needs at least 2 entries"):
            VectorQuantiser(**{"codebook_size": 4, "dim": 2, **settings})


class TestCollapse:
    """A ring that moves away in the first half of the training, as in the chapter."""

    @staticmethod
    def used(revive_below, n_steps=400):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)

        def ring(n, progress):
            angle = 2 * math.pi * torch.rand(n, generator=generator)
            return torch.stack([angle.cos() + 4 * progress, angle.sin()], dim=1)

        q = VectorQuantiser(32, 2, revive_below=revive_below).train()
        for step in range(n_steps):
            q(ring(256, min(1.0, 2 * step / n_steps)))
        points = ring(2_000, 1.0)
        quantised, codes = q.eval()(points)
        return len(codes.unique()), float((points - quantised).square().sum(dim=1).mean())

    def test_without_revival_most_entries_die_and_with_it_none(self):
        (dead_use, dead_error), (use, error) = self.used(0.0), self.used(0.05)
        assert dead_use <= 12 and use >= 30
        assert error < dead_error / 5

    def test_revived_entries_sit_on_vectors_of_the_batch(self):
        torch.manual_seed(0)
        q = VectorQuantiser(4, 1, decay=0.0, revive_below=0.5).train()
        q.start(torch.zeros(1, 1))
        x = torch.tensor([[7.0]])
        q(x)  # all four entries lie on 0; the first is chosen, the others are dead
        assert q.codebook[:, 0].tolist() == [7.0, 7.0, 7.0, 7.0]


class TestPerplexity:
    def test_by_hand(self):
        assert perplexity(torch.tensor([3, 3, 3]), 8) == 1.0
        assert perplexity(torch.arange(8), 8) == 8.0
        assert perplexity(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))

    def test_refuses_nothing(self):
        with pytest.raises(ValueError, match="no codes"):
            perplexity(torch.zeros(0, dtype=torch.long), 4)


class TestResidual:
    @staticmethod
    def trained(n_codebooks=5, steps=60):
        torch.manual_seed(0)
        q, data = ResidualQuantiser(n_codebooks, 16, 6).train(), noise(2, 600, 6, seed=1)
        for _ in range(steps):
            q(data)
        return q.eval(), data

    def test_by_hand(self):
        q = ResidualQuantiser(3, 3, 1).eval()
        for level, values in zip(q.levels, ([0.0, 5.0, 10.0], [-2.0, 0.0, 2.0], [-0.5, 0.0, 0.5])):
            level.codebook[:] = torch.tensor(values)[:, None]
        codes = q.encode(torch.tensor([[[7.4]]]))
        assert codes.tolist() == [[[1, 2, 2]]] and q.decode(codes).tolist() == [[[7.5]]]

    def test_the_error_falls_with_every_codebook(self):
        q, data = self.trained()
        errors = [float((data - q.decode(q.encode(data, n))).square().mean()) for n in range(1, 6)]
        assert all(after < 0.9 * before for before, after in zip(errors, errors[1:])), errors

    def test_codes_of_the_first_codebooks_are_a_prefix(self):
        q, data = self.trained()
        codes = q.encode(data)
        for n in range(1, 6):
            assert torch.equal(q.encode(data, n), codes[..., :n])

    def test_forward_equals_encode_and_decode(self):
        q, data = self.trained()
        total, codes = q(data)
        assert torch.equal(codes, q.encode(data)) and torch.allclose(total, q.decode(codes), atol=1e-5)

    def test_each_item_gets_as_many_codebooks_as_it_asks_for(self):
        q, data = self.trained()
        total, codes = q(data, torch.tensor([2, 5]))
        assert torch.allclose(total[0], q.decode(codes[0, :, :2]), atol=1e-5) and torch.allclose(total[1], q.decode(codes[1]), atol=1e-5)

    def test_rest_plus_entries_is_the_vector(self):
        q, data = self.trained()
        rest = data
        for level in q.levels:
            rest = rest - level.decode(level.encode(rest))
        assert torch.allclose(rest + q.decode(q.encode(data)), data, atol=1e-5)

    def test_never_better_than_shannon(self):
        torch.manual_seed(0)
        q = ResidualQuantiser(3, 16, 4).train()
        for step in range(100):
            q(noise(1, 1_000, 4, seed=step))
        test = noise(4_000, 4, seed=999)
        for n in (1, 2, 3):
            error = float((test - q.eval().decode(q.encode(test, n))).square().mean())
            assert 2.0 ** (-2 * n * 4 / 4) < error < 1

    def test_needs_a_codebook(self):
        with pytest.raises(ValueError, match="at least 1"):
            ResidualQuantiser(0, 4, 2)


def test_doctests():
    import doctest

    import speechlearn.quantiser as module

    found = doctest.testmod(module)
    assert found.attempted >= 2 and found.failed == 0
