"""From sound to text: single waveforms, long files, error rates."""
import json
import shutil
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechlearn.recogniser
from speechlearn.checkpoint import CheckpointError, save_checkpoint
from speechlearn.data.corpora import Corpus, Utterance, Word
from speechlearn.data.synthetic import sampler
from speechlearn.recogniser import Recogniser, Transcript, evaluate, load_recogniser, pieces, quietest_point
from speechlearn.sound.waveform import AudioError, load, resample, save
from speechlearn.text import WordVocabulary

RATE = 16_000
SHIPPED = Path(speechlearn.recogniser.__file__).parent / "checkpoints" / "digits"


@pytest.fixture(scope="module")
def digits() -> Recogniser:
    return load_recogniser("digits")


@pytest.fixture(scope="module")
def spoken():
    return sampler()[:8]


def noise(n: int, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    return level * torch.randn(n, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)


class Loudness(torch.nn.Module):
    """A stand-in for a model: hears a word where the first step is, and notes how much it was given."""

    frame_seconds = 0.04

    def __init__(self):
        super().__init__()
        self.frames = []

    def recognise(self, features, feature_lengths, vocabulary):
        self.frames.append(features.shape[1])
        return [[("word", 1, 2), ("end", int(n) // 4, int(n) // 4 + 9)] for n in feature_lengths]


# -- one waveform -------------------------------------------------------------------------------------------


def test_the_shipped_checkpoint_reads_the_spoken_digits(digits, spoken):
    heard = [digits.transcribe(u.waveform(), RATE).text for u in spoken]
    truth = [u.text for u in spoken]
    assert len(" ".join(truth).split()) > 30
    assert jiwer.wer(truth, heard) < 0.06  # at most two of 34 words


def test_word_times_are_ordered_inside_and_near_the_truth(digits, spoken):
    compared = 0
    for utterance in spoken:
        waveform = utterance.waveform()
        transcript = digits.transcribe(waveform, RATE)
        times = [t for word in transcript.words for t in (word.start, word.end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= len(waveform) / RATE
        assert all(word.end > word.start for word in transcript.words)
        assert transcript.text == str(transcript) == " ".join(word.text for word in transcript.words)
        if transcript.text == utterance.text:
            for heard, true in zip(transcript.words, utterance.words):
                assert true.start - 0.08 < (heard.start + heard.end) / 2 < true.end + 0.08
                compared += 1
    assert compared > 25


def test_times_never_lie_beyond_the_end():
    recogniser = Recogniser(Loudness(), WordVocabulary())
    words = recogniser.transcribe(noise(RATE), RATE).words
    assert [(w.text, w.start) for w in words] == [("word", pytest.approx(0.04)), ("end", pytest.approx(0.96))]
    assert words[0].end == pytest.approx(0.12) and words[1].end == 1.0


def test_silence_is_added_time_not_text(digits, spoken):
    waveform, pause = spoken[2].waveform(), torch.zeros(RATE // 2)
    plain, later = digits.transcribe(waveform, RATE), digits.transcribe(torch.cat([pause, waveform]), RATE)
    assert later.text == plain.text != ""
    for a, b in zip(plain.words, later.words):
        assert b.start - a.start == pytest.approx(0.5, abs=0.13)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_other_sample_rates_are_converted(digits, spoken, rate):
    for utterance in spoken[1:3]:
        transcript = digits.transcribe(resample(utterance.waveform(), RATE, rate), rate)
        assert transcript.text == utterance.text
        assert transcript.words[-1].end <= utterance.seconds + 0.05  # seconds, whatever the rate


def test_loudness_does_not_matter(digits, spoken):
    waveform = spoken[3].waveform()
    assert digits.transcribe(0.02 * waveform, RATE).text == digits.transcribe(waveform, RATE).text == spoken[3].text


def test_dropout_is_off_and_the_same_comes_twice(digits, spoken):
    torch.manual_seed(3)
    model = load_recogniser("digits").model.train()
    again = Recogniser(model, digits.vocabulary)
    assert not model.training
    assert again.transcribe(spoken[0].waveform(), RATE) == digits.transcribe(spoken[0].waveform(), RATE)


@pytest.mark.parametrize(
    "waveform",
    [torch.zeros(RATE), torch.zeros(60 * RATE), noise(RATE, 5e-5), torch.ones(1), noise(399), torch.full((RATE,), 1e-30)],
    ids=["zeros", "a minute of zeros", "hiss", "one sample", "shorter than a window", "tiny"],
)
def test_nothing_is_heard_where_nothing_is(digits, waveform):
    assert digits.transcribe(waveform, RATE) == Transcript("", ())


def test_one_window_is_enough_and_one_sample_less_after_resampling_is_not():
    model = Loudness()
    recogniser = Recogniser(model, WordVocabulary())
    assert recogniser.transcribe(noise(400), RATE).words and model.frames == [1]
    assert recogniser.transcribe(noise(150), 8_000).words == () and model.frames == [1]
    assert recogniser.transcribe(noise(1), 400_000).words == ()  # nothing is left of it at 16 kHz


@pytest.mark.parametrize(
    "waveform, says",
    [
        (torch.tensor([0.0, float("nan")] * RATE), "NaN.*sample 1"),
        (torch.tensor([0.0, 0.0, float("inf")] * RATE), "sample 2"),
        (torch.zeros(0), "no samples"),
    ],
)
def test_damaged_sound_is_refused(digits, waveform, says):
    with pytest.raises(AudioError, match=says):
        digits.transcribe(waveform, RATE)


def test_more_than_a_minute_is_sent_to_transcribe_file(digits):
    with pytest.raises(ValueError, match="60 s.*transcribe_file"):
        digits.transcribe(torch.zeros(60 * RATE + 1), RATE)
    assert digits.transcribe(torch.zeros(60 * 8_000), 8_000).text == ""
    with pytest.raises(ValueError, match="transcribe_file"):
        digits.transcribe(torch.zeros(60 * 8_000 + 1), 8_000)


@pytest.mark.parametrize("rate", [0, -16_000, 100, 500_000])
def test_a_rate_that_is_none_is_named(digits, rate):
    with pytest.raises(AudioError, match=f"{rate}; expected a whole number of hertz"):
        digits.transcribe(noise(RATE), rate)


# -- checkpoints --------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_hears_the_same(tmp_path, digits, spoken):
    save_checkpoint(tmp_path / "copy", digits.model, vocabulary=digits.vocabulary, features=digits.features.settings)
    copy = load_recogniser(tmp_path / "copy")
    assert copy.vocabulary == digits.vocabulary and copy.features.settings == digits.features.settings and copy.sample_rate == RATE
    assert [copy.transcribe(u.waveform(), RATE) for u in spoken[:3]] == [digits.transcribe(u.waveform(), RATE) for u in spoken[:3]]


def changed_checkpoint(folder: Path, **changes) -> Path:
    shutil.copytree(SHIPPED, folder)
    content = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    del content["settings_sha256"]  # as one does who edits it on purpose
    (folder / "checkpoint.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return folder


def test_a_copy_of_the_shipped_folder_loads(tmp_path, spoken):  # so the next test fails for its changes alone
    assert load_recogniser(changed_checkpoint(tmp_path / "a")).transcribe(spoken[0].waveform(), RATE).text == spoken[0].text


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "second-recogniser"},
        {"config": {"vocab": 3}},
        {"features": {"bins": 80}},
        {"features": {"hop_ms": 0.0}},
        {"vocabulary": None},
        {"vocabulary": {"kind": "words", "words": ["yes", "no"], "unknown": "error"}},
        {"features": {"n_bins": 40}},
    ],
    ids=["model", "config", "unknown feature setting", "impossible feature setting", "no vocabulary", "smaller vocabulary", "other bins"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_when_loaded(tmp_path, changes):
    with pytest.raises(CheckpointError):
        load_recogniser(changed_checkpoint(tmp_path / "bad", **changes))


def test_damaged_weights_and_missing_folders_are_refused(tmp_path):
    folder = changed_checkpoint(tmp_path / "damaged")
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights"):
        load_recogniser(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="weights"):
        load_recogniser(folder)
    with pytest.raises(CheckpointError, match="Did you mean 'digits'"):
        load_recogniser("digit")


# -- long files ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-9, 9), min_size=4, max_size=30), st.integers(1, 4))
@settings(deadline=None)
def test_quietest_point_by_trying_all(samples, window):
    waveform = torch.tensor(samples, dtype=torch.float32)
    energies = [sum(x * x for x in samples[i : i + window]) for i in range(len(samples) - window + 1)]
    first = quietest_point(waveform, 10, window_seconds=window / 10) - window // 2
    assert energies[first] == min(energies)


def test_quietest_point_needs_a_window_and_is_exact_after_loud_sound():
    with pytest.raises(ValueError, match="fewer than one window"):
        quietest_point(torch.ones(3199), RATE)
    assert quietest_point(torch.ones(3200), RATE) == 1600
    waveform = noise(20 * RATE, 1e-3)
    waveform[: 10 * RATE] += 1.0  # a running sum in float32 would have lost the quiet part
    waveform[15 * RATE : 15 * RATE + 3200] *= 0.5
    assert abs(quietest_point(waveform, RATE) - 15 * RATE - 1600) < 160


@pytest.mark.parametrize("n", [1, RATE - 1, RATE, RATE + 1, 2 * RATE, 2 * RATE + 1, 7 * RATE + 123])
def test_pieces_joined_are_the_file(tmp_path, n):
    save(tmp_path / "a.wav", noise(n), RATE)
    found = list(pieces(tmp_path / "a.wav", sample_rate=RATE, longest_seconds=1.0))
    assert torch.equal(torch.cat([piece for _, piece in found]), load(tmp_path / "a.wav", RATE))
    place = 0
    for start, piece in found:
        assert start * RATE == pytest.approx(place, abs=1e-3) and 0 < len(piece) <= RATE
        place += len(piece)
    assert len(found) <= 2 + 2 * n // RATE  # a cut lies in the last half


def test_pieces_of_a_resampled_stereo_file_are_the_file(tmp_path):
    stereo = torch.stack([noise(5 * 44_100, seed=1), noise(5 * 44_100, seed=2)], dim=1)
    soundfile.write(tmp_path / "a.flac", stereo.numpy(), 44_100)
    joined = torch.cat([piece for _, piece in pieces(tmp_path / "a.flac", sample_rate=RATE, longest_seconds=1.3)])
    whole = load(tmp_path / "a.flac", RATE)
    assert joined.shape == whole.shape and (joined - whole).abs().max() < 1e-5


def test_cuts_fall_into_the_pauses(tmp_path):
    waveform, pauses, place = noise(60 * RATE), [], 0
    generator = torch.Generator().manual_seed(4)
    while True:
        place += int((1.5 + 4 * torch.rand((), generator=generator)) * RATE)  # speech
        if place + 4800 > len(waveform):
            break
        waveform[place : place + 4800] *= 0.01
        pauses.append((place, place + 4800))
        place += 4800
    save(tmp_path / "a.wav", waveform, RATE)
    cuts = [round(start * RATE) for start, _ in pieces(tmp_path / "a.wav", sample_rate=RATE)][1:]
    assert len(cuts) >= 3
    for cut in cuts:  # with 0.1 s of quiet to each side
        assert any(first + 1599 <= cut <= last - 1599 for first, last in pauses)


def test_a_long_file_is_read_piece_by_piece(tmp_path, monkeypatch):
    waveform = torch.cat([noise(20 * RATE)] * 15)  # 5 minutes
    save(tmp_path / "long.wav", waveform, RATE)
    read, given_back, most, stream = 0, 0, 0, speechlearn.recogniser.stream

    def counted(*args, **kwargs):
        nonlocal read, most
        for block in stream(*args, **kwargs):
            read += len(block)
            most = max(most, read - given_back)
            yield block

    monkeypatch.setattr(speechlearn.recogniser, "stream", counted)
    for _, piece in pieces(tmp_path / "long.wav", sample_rate=RATE):
        given_back += len(piece)
    assert read == given_back == len(waveform) and most <= 40 * RATE  # never more than two pieces at a time

    model, seen = Loudness(), []
    transcript = Recogniser(model, WordVocabulary()).transcribe_file(tmp_path / "long.wav", progress=seen.append)
    assert max(model.frames) <= 2000 and 15 <= len(model.frames) <= 30  # pieces of 10 to 20 s
    assert seen == sorted(seen) and len(seen) == len(model.frames) and seen[-1] == pytest.approx(300)
    starts = [0.0, *seen[:-1]]
    assert [w.start for w in transcript.words[::2]] == pytest.approx([s + 0.04 for s in starts])
    assert all(0 <= w.start < w.end <= 300 for w in transcript.words)


def test_a_long_recording_of_digits_is_understood(tmp_path, digits, spoken):
    pause, parts, truth, now = torch.zeros(4800), [], [], 0.0
    for utterance in [*spoken, *spoken, *spoken]:
        waveform = utterance.waveform()
        parts += [waveform, pause]
        truth += [Word(w.text, w.start + now, w.end + now) for w in utterance.words]
        now += (len(waveform) + len(pause)) / RATE
    save(tmp_path / "long.flac", torch.cat(parts), RATE)
    assert now > 45
    whole = digits.transcribe_file(tmp_path / "long.flac")
    by_piece = [(start, digits.transcribe(piece, RATE)) for start, piece in pieces(tmp_path / "long.flac", sample_rate=RATE)]
    assert len(by_piece) >= 3
    assert whole.text.split() == [w.text for w in whole.words] == " ".join(part.text for _, part in by_piece).split()
    assert [w.start for w in whole.words] == [w.start + start for start, part in by_piece for w in part.words]
    assert jiwer.wer(" ".join(w.text for w in truth), whole.text) < 0.06  # eight voices in one recording: harder than each alone
    near = sum(any(t.text == w.text and t.start - 0.1 < w.start < t.end + 0.1 for t in truth) for w in whole.words)
    assert near > 0.88 * len(whole.words)


def test_a_short_file_reads_like_its_waveform(tmp_path, digits, spoken):
    save(tmp_path / "a.wav", spoken[4].waveform(), RATE)
    assert digits.transcribe_file(tmp_path / "a.wav") == digits.transcribe(load(tmp_path / "a.wav", RATE), RATE)
    save(tmp_path / "silence.wav", torch.zeros(30 * RATE), RATE)
    assert digits.transcribe_file(str(tmp_path / "silence.wav")) == Transcript("", ())


def test_bad_files_are_refused(tmp_path, digits):
    damaged = noise(50 * RATE)
    damaged[45 * RATE] = float("nan")
    soundfile.write(tmp_path / "nan.wav", damaged.numpy(), RATE, subtype="FLOAT")
    first = next(iter(pieces(tmp_path / "nan.wav", sample_rate=RATE)))  # what comes before the damage can be had
    assert torch.equal(first[1], damaged[: len(first[1])])
    with pytest.raises(AudioError, match="from 40.0 s on.*NaN"):
        list(pieces(tmp_path / "nan.wav", sample_rate=RATE))
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "empty.wav").touch()
    for name, says in [("text.wav", "no sound file"), ("empty.wav", "empty file"), ("none.wav", "there is no file"), ("", "is a folder")]:
        with pytest.raises(AudioError, match=says):
            digits.transcribe_file(tmp_path / name)


# -- error rates --------------------------------------------------------------------------------------------


class Silence:
    def __init__(self, seconds):
        self.seconds = seconds

    def read(self, sample_rate):
        return torch.zeros(round(self.seconds * sample_rate))


class Prompted(Recogniser):
    """Says what it was told to say."""

    def __init__(self, answers):
        super().__init__(Loudness(), WordVocabulary())
        self.answers = iter(answers)

    def transcribe(self, waveform, sample_rate):
        return Transcript(next(self.answers))


TEXTS = st.lists(st.sampled_from(["one", "two", "three", "oh"]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_counts_are_those_of_jiwer(pairs):
    references, hypotheses = [list(texts) for texts in zip(*pairs)]
    corpus = Corpus("made", "test", [Utterance(f"u{i}", text, "s", 0.5 + i, Silence(0.5 + i)) for i, text in enumerate(references)])
    result = evaluate(Prompted(hypotheses), corpus)
    words, characters = jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses)
    assert result.wer == pytest.approx(words.wer) and result.cer == pytest.approx(characters.cer)
    edits = words.substitutions + words.deletions + words.insertions
    assert result.substitutions + result.deletions + result.insertions == edits
    assert result.insertions - result.deletions == words.insertions - words.deletions  # whichever of the best alignments was taken
    assert result.words == sum(len(r.split()) for r in references) and result.utterances == len(pairs)
    assert result.wrong_utterances == sum(r != h for r, h in pairs)
    assert result.seconds_audio == pytest.approx(sum(0.5 + i for i in range(len(pairs)))) and result.seconds_compute >= 0
    assert result.references == tuple(references) and result.hypotheses == tuple(hypotheses)


def test_summary_is_ready_for_json(digits, spoken):
    result = evaluate(digits, spoken[:2], progress=lambda corpus: iter(corpus))
    assert {"wer", "cer", "utterances", "words", "seconds_audio", "seconds_compute"} <= set(result.summary())
    assert json.loads(json.dumps(result.summary())) == result.summary() and "references" not in result.summary()
    assert result.utterances == 2 and result.words == 7 and result.seconds_audio == pytest.approx(spoken[:2].seconds, abs=0.05)


def test_an_empty_corpus_has_no_error_rate(digits):
    with pytest.raises(ValueError, match="no utterances.*split and speakers"):
        evaluate(digits, Corpus("none", "test", []))


def test_the_figure_shows_each_word(spoken):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from speechlearn.recogniser import plot_transcript

    transcript = Transcript("three nine", (Word("three", 0.1, 0.3), Word("nine", 0.5, 0.7)))
    ax = plot_transcript(spoken[0].waveform(), transcript, RATE, truth=spoken[0].words)
    assert [t.get_text() for t in ax.texts] == ["three", "nine", *[w.text for w in spoken[0].words]]
    assert [t.get_position()[0] for t in ax.texts[:2]] == pytest.approx([0.2, 0.6])
    plt.close("all")


def test_features_are_normalised_as_the_model_was_trained(digits, spoken, monkeypatch):
    """Each of the names a data set knows; an unknown one is no silent default."""
    from speechlearn.sound.features import NORMALISATIONS

    seen, waveform = [], spoken[0].waveform(16_000)
    for name in NORMALISATIONS:
        monkeypatch.setattr(digits.model, "normalise", name, raising=False)
        monkeypatch.setattr(digits.model, "recognise", lambda features, lengths, vocabulary: seen.append(features) or [[]], raising=False)
        digits.transcribe(waveform, 16_000)
    assert len(seen) == 3 and all((a - b).abs().max() > 0.1 for a, b in [(seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])])
    monkeypatch.setattr(digits.model, "normalise", "somehow", raising=False)
    with pytest.raises(KeyError, match="somehow"):
        digits.transcribe(waveform, 16_000)
