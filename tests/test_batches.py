"""data.batches: rectangles, masks, what CTC can align, groups by length, the same on every run."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speechlearn.data.augment import Augment
from speechlearn.data.batches import (
    Batch, BucketSampler, Item, SpeechDataset, assert_batch_independent, check_alignable, collate, generator_for, is_padding, make_loader, n_repeats, padding_share, unalignable,
)
from speechlearn.data.corpora import Corpus, Utterance
from speechlearn.data.synthetic import sampler
from speechlearn.sound.features import LogMel
from speechlearn.text import CharacterVocabulary


@pytest.fixture(scope="module")
def corpus():
    return sampler()[:8]


def item(frames, tokens=2, name="x", seed=0):
    return Item(torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(5, 5 + tokens), "ab", name)


def test_is_padding_by_hand():
    assert is_padding(torch.tensor([1, 3])).tolist() == [[False, True, True], [False, False, False]]
    assert is_padding(torch.tensor([1]), 3).shape == (1, 3)
    with pytest.raises(ValueError, match="has length 4, but the rectangle is only 3 wide"):
        is_padding(torch.tensor([4]), 3)


def test_collate_keeps_what_is_real():
    items = [item(3, 2, "a", 1), item(5, 1, "b", 2)]
    batch = collate(items, pad=1, round_to=4)
    assert batch.features.shape == (2, 8, 4) and batch.feature_lengths.tolist() == [3, 5]
    assert torch.equal(batch.features[0, :3], items[0].features) and (batch.features[0, 3:] == 0).all()
    assert batch.targets.tolist() == [[5, 6], [5, 1]] and batch.ids == ["a", "b"] and len(batch) == 2
    assert batch.to("cpu").features.device.type == "cpu"


def test_collate_names_bad_items():
    with pytest.raises(ValueError, match="no items"):
        collate([])
    with pytest.raises(ValueError, match="'b' has an empty transcript"):
        collate([item(3), item(3, 0, "b")])
    with pytest.raises(ValueError, match="'c' has no frames"):
        collate([item(0, 2, "c")])


def test_batch_refuses_lengths_that_exceed_the_data():
    good = dict(features=torch.zeros(1, 3, 2), feature_lengths=torch.tensor([3]), targets=torch.zeros(1, 2, dtype=torch.long), target_lengths=torch.tensor([2]), texts=["a"], ids=["u"])
    Batch(**good)
    for change, message in (
        ({"feature_lengths": torch.tensor([4])}, "feature_lengths of 'u' is 4"), ({"target_lengths": torch.tensor([0])}, "target_lengths of 'u' is 0"), ({"texts": []}, "1 features but 0 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            Batch(**{**good, **change})


def test_repeats_and_alignability_by_hand():
    targets, lengths = torch.tensor([[5, 5, 6, 1], [5, 6, 6, 6], [5, 1, 1, 1]]), torch.tensor([3, 4, 1])
    assert n_repeats(targets, lengths).tolist() == [1, 2, 0]
    assert unalignable(torch.tensor([4, 5, 1]), targets, lengths).tolist() == [False, True, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 9))
def test_unalignable_is_where_torch_has_an_infinite_loss(target, steps):
    log_probs = torch.zeros(steps, 1, 4).log_softmax(-1)
    targets, lengths = torch.tensor([target]), torch.tensor([len(target)])
    loss = F.ctc_loss(log_probs, targets, torch.tensor([steps]), lengths, reduction="sum")
    assert bool(unalignable(torch.tensor([steps]), targets, lengths)[0]) == bool(loss.isinf())


def test_too_many_unalignable_are_refused():
    targets, lengths = torch.full((100, 3), 5), torch.full((100,), 3)
    steps = torch.full((100,), 9)
    steps[7] = 2
    ids = [f"u{i}" for i in range(100)]
    assert check_alignable(steps, targets, lengths, ids) == ["u7"]
    steps[8] = 2
    with pytest.raises(ValueError, match=r"2 of 100 utterances \(2.0%\).*'u7'"):
        check_alignable(steps, targets, lengths, ids)


def test_company_does_not_change_an_utterance(corpus):
    data = SpeechDataset(corpus, LogMel(), CharacterVocabulary())
    together = collate([data[i] for i in range(len(data))])
    for i in range(len(data)):
        n = int(together.feature_lengths[i])
        assert torch.equal(together.features[i, :n], data[i].features)
        assert together.features[i, :n].mean(dim=0).abs().max() < 1e-4


def test_draws_follow_seed_epoch_and_index_only(corpus):
    data = SpeechDataset(corpus, LogMel(), CharacterVocabulary(), augment=Augment(), seed=3)
    first = [data[i].features for i in range(4)]
    torch.manual_seed(7)
    again = [data[i].features for i in (3, 2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    data.set_epoch(1)
    assert not torch.equal(data[0].features[:40], first[0][:40])
    other = SpeechDataset(corpus, LogMel(), CharacterVocabulary(), augment=Augment(), seed=4)
    assert not torch.equal(other[0].features[:40], first[0][:40])
    assert generator_for(1, 2).initial_seed() == generator_for(1, 2).initial_seed() != generator_for(2, 1).initial_seed()


def test_workers_do_not_change_batches(corpus):
    data = SpeechDataset(corpus, LogMel(), CharacterVocabulary(), augment=Augment(), seed=1)
    alone = list(make_loader(data, max_frames=1500, seed=2))
    helped = list(make_loader(data, max_frames=1500, seed=2, n_workers=2))
    assert [b.ids for b in alone] == [b.ids for b in helped]
    assert all(torch.equal(a.features, b.features) and torch.equal(a.targets, b.targets) for a, b in zip(alone, helped))


def test_dataset_names_bad_utterances():
    class Sound:
        def __init__(self, samples):
            self.samples = samples

        def read(self, sample_rate):
            return torch.ones(self.samples)

    def made(text, samples=4000):
        return Corpus("c", "train", [Utterance("u7", text, "s", samples / 16_000, Sound(samples))])

    for text, message in (("", "'u7' has an empty transcript"), ("room 5", "'u7': '5' at position 5")):
        with pytest.raises(ValueError, match=message):
            SpeechDataset(made(text), LogMel(), CharacterVocabulary())
    with pytest.raises(ValueError, match="'u7'.*one window needs 400"):
        SpeechDataset(made("a", 100), LogMel(), CharacterVocabulary())[0]
    with pytest.raises(ValueError, match="keep=True would repeat"):
        SpeechDataset(made("a"), LogMel(), CharacterVocabulary(), augment=Augment(), keep=True)


def test_kept_items_are_equal_and_not_computed_again(corpus):
    data = SpeechDataset(corpus, LogMel(), CharacterVocabulary(), keep=True)
    assert data[1] is data[1]
    assert torch.equal(data[1].features, SpeechDataset(corpus, LogMel(), CharacterVocabulary())[1].features)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(300, 3000), st.integers(0, 5), st.booleans(), st.sampled_from([1, 16]))
def test_each_utterance_once_and_no_batch_too_large(lengths, max_frames, epoch, shuffle, round_to):
    buckets = BucketSampler(lengths, max_frames=max(max_frames, 304), shuffle=shuffle, round_to=round_to)
    buckets.set_epoch(epoch)
    batches = list(buckets)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(-(-lengths[i] // round_to) * round_to for i in batch) <= max(max_frames, 304)
    assert list(buckets) == batches and len(buckets) == len(batches)


def test_order_changes_with_epoch_and_seed_and_is_kept_by_state():
    lengths = torch.randint(50, 400, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = BucketSampler(lengths, max_frames=4000, seed=1)
    first = list(buckets)
    buckets.set_epoch(1)
    second = list(buckets)
    assert first != second != list(BucketSampler(lengths, max_frames=4000, seed=2))
    again = BucketSampler(lengths, max_frames=4000, seed=1)
    again.load_state_dict(buckets.state_dict())
    assert list(again) == second


def test_grouping_saves_padding():
    lengths = torch.randint(50, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    grouped = padding_share(BucketSampler(lengths, max_frames=4000).batches(), lengths)
    random = padding_share([list(range(i, min(i + 12, 1000))) for i in range(0, 1000, 12)], lengths)
    assert grouped < 0.1 < 0.3 < random
    assert padding_share([[0, 1]], [1, 3]) == pytest.approx(2 / 6)


def test_one_utterance_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="utterance 1 alone has 900 frames"):
        BucketSampler([10, 900], max_frames=500)
    with pytest.raises(ValueError, match="no utterances"):
        BucketSampler([], max_frames=500)


class TestBatchIndependence:
    """The shared check itself: it passes what is right, and names what is wrong."""

    x = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([20, 11, 1])

    def test_masked_mean_passes_and_plain_mean_does_not(self):
        def masked(x, lengths):
            real = ~is_padding(lengths, x.shape[1])[..., None]
            return x - (x * real).sum(1, keepdim=True) / lengths[:, None, None], lengths

        assert_batch_independent(masked, self.x, self.lengths)
        with pytest.raises(AssertionError, match=r"utterance 1 \(11 frames of 20\) changes with its batch mates: largest difference .* at output frame \d+ of 11"):
            assert_batch_independent(lambda x, n: (x - x.mean(1, keepdim=True), n), self.x, self.lengths)

    def test_lengths_that_depend_on_the_batch(self):
        with pytest.raises(AssertionError, match="utterance 1 .* has 20 output frames in the batch but 11 alone"):
            assert_batch_independent(lambda x, n: (x, torch.full_like(n, x.shape[1])), self.x, self.lengths)

    def test_nan_does_not_pass(self):
        def poisoned(x, lengths):
            return x * (float("nan") if len(x) > 1 else 1.0), lengths

        with pytest.raises(AssertionError, match="utterance 0"):
            assert_batch_independent(poisoned, self.x, self.lengths)

    def test_tolerance(self):
        def slightly(x, lengths):
            return x + 1e-4 * len(x), lengths

        assert_batch_independent(slightly, self.x, self.lengths, atol=1e-3)
        with pytest.raises(AssertionError, match="largest difference"):
            assert_batch_independent(slightly, self.x, self.lengths)
