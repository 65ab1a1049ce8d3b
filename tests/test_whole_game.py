"""The first recogniser: padding, loss, decoding, learning."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.checkpoint import load_checkpoint, save_checkpoint
from speechlearn.data.batches import Batch, SpeechDataset, collate
from speechlearn.data.synthetic import sampler
from speechlearn.sound.features import LogMel
from speechlearn.text import CharacterVocabulary, SubwordVocabulary, WordVocabulary
from speechlearn.whole_game import FirstRecogniser, FirstRecogniserConfig, LocalMixer, spikes, words_of

LENGTHS = [1, 2, 3, 17, 40, 61]


def small(vocab=7, **settings) -> FirstRecogniser:
    torch.manual_seed(0)
    return FirstRecogniser(FirstRecogniserConfig(vocab=vocab, **{"n_bins": 12, "d_model": 16, "n_layers": 2, "d_feedforward": 32, "kernel_size": 5, **settings}))


def noise(*shape, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(targets: list[list[int]], frames: list[int], *, bins=12, seed=2) -> Batch:
    wide = torch.full((len(targets), max(map(len, targets))), 1)
    for row, ids in zip(wide, targets):
        row[: len(ids)] = torch.tensor(ids)
    n = len(targets)
    return Batch(noise(n, max(frames), bins, seed=seed), torch.tensor(frames), wide, torch.tensor([len(t) for t in targets]), ["x"] * n, [f"u{i}" for i in range(n)])


def forward_sum(log_probs: torch.Tensor, target: list[int]) -> float:
    """−log of the summed probability of all paths: the recursion of Graves et al. (2006), in plain numbers."""
    probs, states = log_probs.double().exp().tolist(), [0]
    for symbol in target:
        states += [symbol, 0]
    alpha = [probs[0][0], probs[0][states[1]]] + [0.0] * (len(states) - 2)
    for row in probs[1:]:
        alpha = [
            row[s] * (alpha[i] + (alpha[i - 1] if i else 0) + (alpha[i - 2] if i > 1 and s != 0 and s != states[i - 2] else 0))
            for i, s in enumerate(states)
        ]
    return -math.log(alpha[-1] + alpha[-2])


# -- padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training_path", [False, True], ids=["inference", "with gradient"])
def test_a_padded_batch_equals_single_utterances(training_path):
    model = small().eval()
    x = noise(len(LENGTHS), max(LENGTHS) + 9, 12)
    with torch.set_grad_enabled(training_path):
        together, steps = model(x, torch.tensor(LENGTHS))
        for i, n in enumerate(LENGTHS):
            alone, own = model(x[i : i + 1, :n], torch.tensor([n]))
            assert int(own[0]) == alone.shape[1] == int(steps[i]) == math.ceil(math.ceil(n / 2) / 2)
            assert (together[i, : int(own[0])] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("value", [1e30, -1e30, math.nan, math.inf])
def test_what_lies_in_the_padding_never_matters(value):
    model = small().eval()
    lengths = torch.tensor([37, 60, 5])
    clean = noise(3, 60, 12)
    dirty = clean.clone()
    for row, n in zip(dirty, lengths):
        row[int(n) :] = value
    (a, steps), (b, _) = model(clean, lengths), model(dirty, lengths)
    for i, n in enumerate(steps.tolist()):
        assert torch.equal(a[i, :n], b[i, :n])
    assert not torch.equal(clean[0], dirty[0])  # the test did change something


def test_gradients_are_finite_and_do_not_flow_into_padding():
    model, lengths = small(), torch.tensor([37, 60])
    x = noise(2, 60, 12).requires_grad_()
    log_probs, steps = model(x, lengths)
    sum(log_probs[i, :n].exp().square().sum() for i, n in enumerate(steps.tolist())).backward()
    assert (x.grad[0, 37:] == 0).all() and x.grad[0, :37].abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_local_mixer_reads_neighbours_but_no_padding():
    torch.manual_seed(0)
    mixer, x = LocalMixer(8, 5, 0.0).eval(), noise(1, 12, 8)
    padding = torch.arange(12)[None] >= 9
    changed = x.clone()
    changed[:, 9:] = 50.0
    assert torch.equal(mixer(x, padding)[:, :9], mixer(changed, padding)[:, :9])
    changed = x.clone()
    changed[:, 4, 0] += 3.0  # one number: layer normalisation would undo a shift of all
    reached = (mixer(x, padding) != mixer(changed, padding)).any(dim=2)[0].nonzero().flatten().tolist()
    assert reached == [2, 3, 4, 5, 6]  # kernel 5 sees two to each side


def test_log_probabilities_sum_to_one_and_steps_last_40_ms():
    log_probs, steps = small().eval()(noise(1, 100, 12), torch.tensor([100]))
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(1, 25), atol=1e-6)
    assert int(steps[0]) * FirstRecogniser.frame_seconds == pytest.approx(1.0)  # 100 frames of 10 ms


@pytest.mark.parametrize(
    "shape, lengths, says", [((1, 20, 9), [20], "9 bins.*12"), ((2, 20, 12), [20, 21], "21.*1 and the 20"), ((2, 20, 12), [20, 0], "says 0")]
)
def test_wrong_input_is_refused(shape, lengths, says):
    with pytest.raises(ValueError, match=says):
        small()(noise(*shape), torch.tensor(lengths))


@pytest.mark.parametrize("wrong, says", [({"vocab": 1}, "vocab is 1"), ({"vocab": 7, "d_model": 18}, "multiple of n_heads"), ({"vocab": 7, "kernel_size": 4}, "odd")])
def test_wrong_sizes_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        FirstRecogniserConfig(**wrong)


def test_default_size_is_as_documented():
    model = FirstRecogniser(FirstRecogniserConfig(vocab=15))
    assert 4e5 < sum(p.numel() for p in model.parameters()) < 6e5


# -- loss ---------------------------------------------------------------------------------------------------


def test_loss_equals_the_sum_over_paths():
    model, batch = small().eval(), batch_of([[5, 6], [6, 6, 5], [5]], [40, 33, 9])
    log_probs, steps = model(batch.features, batch.feature_lengths)
    by_hand, by_torch = [], []
    for i in range(3):
        own, target = log_probs[i, : int(steps[i])].detach(), batch.targets[i, : int(batch.target_lengths[i])]
        by_hand.append(forward_sum(own, target.tolist()) / len(target))
        by_torch.append(float(torch.nn.functional.ctc_loss(own[:, None], target[None], (len(own),), (len(target),), reduction="sum")) / len(target))
    result = {name: value.detach() for name, value in model.loss(batch).items()}
    assert by_hand == pytest.approx(by_torch, rel=1e-4)
    assert float(result["loss"]) == pytest.approx(sum(by_hand) / 3, rel=1e-4)
    assert float(result["too_short"]) == 0


def test_an_utterance_that_is_too_short_is_left_out_and_counted():
    # 9 frames are 3 steps: "6 6" needs exactly 3 (a blank between), "5 6 5 6" needs 4.
    model = small().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    batch = batch_of([[5, 6], [6, 6], [5, 6, 5, 6]], [40, 9, 9])
    result = model.loss(batch)
    log_probs, steps = model(batch.features, batch.feature_lengths)
    assert steps.tolist() == [10, 3, 3]
    expected = sum(forward_sum(log_probs[i, : int(steps[i])].detach(), t) / 2 for i, t in enumerate([[5, 6], [6, 6]])) / 2
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-4)
    assert float(result["too_short"]) == pytest.approx(1 / 3)
    result["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with_short = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(Batch(batch.features[:2], batch.feature_lengths[:2], batch.targets[:2, :2], batch.target_lengths[:2], ["x"] * 2, ["a", "b"]))["loss"].backward()
    for a, b in zip(with_short, (p.grad for p in model.parameters())):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_batch_without_any_alignable_utterance_is_refused():
    with pytest.raises(ValueError, match="u0, u1.*needs"):
        small().loss(batch_of([[5, 5, 5], [5, 6, 5, 6]], [9, 9]))


# -- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, expected",
    [
        ([], []),
        ([0, 0], []),
        ([3], [(3, 0, 0)]),
        ([3, 3, 3], [(3, 0, 2)]),
        ([3, 0, 3], [(3, 0, 0), (3, 2, 2)]),
        ([3, 4, 4, 0, 0, 4], [(3, 0, 0), (4, 1, 2), (4, 5, 5)]),
    ],
)
def test_spikes_by_hand(path, expected):
    assert spikes(path) == expected


def test_spikes_with_another_blank():
    assert spikes([9, 0, 0, 9, 0], blank=9) == [(0, 1, 2), (0, 4, 4)]


@given(st.lists(st.integers(0, 3), max_size=40))
def test_spikes_are_the_collapse_and_can_be_undone(path):
    found = spikes(path)
    assert [s for s, _, _ in found] == [s for s, _ in itertools.groupby(path) if s]
    again = [0] * len(path)
    for symbol, first, last in found:
        for step in range(first, last + 1):
            assert again[step] == 0
            again[step] = symbol
    assert again == path


LETTERS = CharacterVocabulary()


def path_of(text):  # one step for each character, a blank after it
    return [i for symbol in LETTERS.encode(text) for i in (symbol, 0)]


def test_words_by_hand():
    assert words_of(spikes(path_of("hi you")), LETTERS) == [("hi", 0, 2), ("you", 6, 10)]
    assert words_of(spikes(path_of("  a  ")), LETTERS) == [("a", 4, 4)]
    assert words_of([], LETTERS) == [] and words_of(spikes(path_of("   ")), LETTERS) == []
    digits = WordVocabulary()
    one, two = digits.encode("one two")
    assert words_of(spikes([0, one, one, 0, one, two, two]), digits) == [("one", 1, 2), ("one", 4, 4), ("two", 5, 6)]


@given(st.text(alphabet=" 'abz", max_size=25))
@settings(deadline=None)
def test_words_are_those_of_the_text_at_their_places(text):
    words = words_of(spikes(path_of(text)), LETTERS)
    assert [w for w, _, _ in words] == text.split()
    for word, first, last in words:
        assert text[first // 2 : last // 2 + 1] == word and first % 2 == last % 2 == 0


def test_specials_are_no_words():
    a = LETTERS.encode("a")[0]
    assert words_of([(1, 0, 0), (2, 1, 1)], LETTERS) == []
    assert [w for w, _, _ in words_of([(1, 0, 0), (a, 1, 1)], LETTERS)] == ["a"]
    assert words_of([(3, 0, 0), (WordVocabulary().encode("nine")[0], 4, 5)], WordVocabulary()) == [("nine", 4, 5)]


def test_subwords_are_joined_to_words():
    texts = ["the lamp", "the light", "a lamp", "thing", "lighter"] * 3
    vocabulary = SubwordVocabulary.train(texts, vocab_size=24)
    ids = vocabulary.encode("the lighter lamp")
    assert len(ids) > 3  # otherwise nothing needs joining
    words = words_of([(s, i, i) for i, s in enumerate(ids)], vocabulary)
    assert [w for w, _, _ in words] == ["the", "lighter", "lamp"]


def test_recognise_reads_the_best_path_of_valid_steps_only():
    vocabulary = WordVocabulary(["yes", "no"])
    model = small(vocab=len(vocabulary)).eval()
    x, lengths = noise(3, 80, 12), torch.tensor([80, 43, 10])
    x[1, 43:] = 1e6
    log_probs, steps = model(x, lengths)
    heard = model.recognise(x, lengths, vocabulary)
    for i, n in enumerate(steps.tolist()):
        path = log_probs[i, :n].argmax(-1).tolist()
        runs = [(s, len(list(g))) for s, g in itertools.groupby(path)]
        assert " ".join(w for w, _, _ in heard[i]) == " ".join(vocabulary.decode([s]) for s, _ in runs if s >= 4)  # 4 reads �
        assert all(0 <= first <= last < n for _, first, last in heard[i])


# -- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [WordVocabulary(), CharacterVocabulary()], ids=["words", "letters"])
def test_learns_one_batch_by_heart(vocabulary):
    data = SpeechDataset(sampler()[:4], LogMel(), vocabulary)
    batch = collate([data[i] for i in range(4)])
    model = small(len(vocabulary), n_bins=80, d_model=48, d_feedforward=96, dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(150):
        optimiser.zero_grad()
        loss = model.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step == 0:
            assert loss > 2
    heard = model.eval().recognise(batch.features, batch.feature_lengths, vocabulary)
    assert loss < 0.2 and [" ".join(w for w, _, _ in words) for words in heard] == batch.texts


def test_checkpoint_gives_back_the_same_model(tmp_path):
    model = small(vocab=15).eval()
    save_checkpoint(tmp_path, model, vocabulary=WordVocabulary(), features={"n_mels": 12}, metadata={"why": "test"})
    torch.manual_seed(99)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded.model) is FirstRecogniser and loaded.model.config == model.config and not loaded.model.training
    assert loaded.vocabulary == WordVocabulary() and loaded.features == {"n_mels": 12} and loaded.metadata == {"why": "test"}
    x, lengths = noise(2, 50, 12), torch.tensor([50, 31])
    assert torch.equal(loaded.model(x, lengths)[0], model(x, lengths)[0])
    torch.manual_seed(99)
    other = FirstRecogniser(model.config).eval()
    assert not torch.equal(other(x, lengths)[0], model(x, lengths)[0])  # the weights matter, so they were really read
