"""Live text: features of a sound that goes on, searches that never take back what was certain, the whole at any cutting, the clock, pipes, a microphone, the command."""
import io
import json
import math
import sys
import types
import wave
from dataclasses import replace

import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn import live as live_module
from speechlearn.alignment.ctc import ctc_greedy
from speechlearn.alignment.transducer import Decoder, Joiner
from speechlearn.alignment.transducer_search import TransducerSearch
from speechlearn.checkpoint import save_checkpoint
from speechlearn.cli import main
from speechlearn.data.corpora import Word
from speechlearn.live import BestPath, CertainBeam, FeatureStream, Heard, Listening, LiveRecogniser, _Words, floor_noise, listen, microphone, pcm, plot_listening
from speechlearn.recogniser import Recogniser, Transcript
from speechlearn.sound.features import LogMel, normalise_running
from speechlearn.sound.waveform import AudioError, resample, save
from speechlearn.text import CharacterVocabulary, SubwordVocabulary, WordVocabulary
from speechlearn.whole_game import words_of
from speechlearn.zipformer.recogniser import ZipformerRecogniser, small_config

RATE = 16_000
TINY = dict(
    n_bins=20, front_channels=(2, 3, 4), downsampling_factor=(1, 2), encoder_dim=(12, 16), encoder_unmasked_dim=(12, 16), num_encoder_layers=(1, 1), feedforward_dim=(16, 16), num_heads=(2, 2),
    cnn_module_kernel=(7, 5), query_head_dim=4, value_head_dim=4, decoder_dim=16, joiner_dim=16,
)


def made(heads="ctc", vocabulary=None, causal=True, seed=0, **changes):
    """A recogniser with weights by chance, whose heads are set so that they write different symbols at different moments."""
    torch.manual_seed(seed)
    vocabulary = vocabulary or CharacterVocabulary("abc ")
    chunks = dict(chunk_size=(8, 16, -1), left_context_frames=(16, 32, -1)) if causal else {}
    model = ZipformerRecogniser(small_config("tiny", len(vocabulary), heads=heads, causal=causal, **TINY | chunks | changes)).eval()
    features = LogMel(n_bins=20, f_max=4000.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        mel, lengths = features(sound(50_000)[None], torch.tensor([50_000]))
        out = model(normalise_running(mel, lengths), lengths)[0][0]
        for layer in filter(None, (model.model.ctc_output and model.model.ctc_output[1], model.model.joiner and model.model.joiner.encoder_proj)):
            layer.weight.copy_(torch.randn_like(layer.weight))
            layer.weight.mul_(3 / (out @ layer.weight.T).std(dim=0)[:, None])
            layer.bias.copy_(-layer.weight @ out.mean(dim=0))
        if model.model.joiner is not None:
            model.model.joiner.output_linear.weight.mul_(6)
            model.model.joiner.output_linear.bias[0] += 1.0
    return Recogniser(model, vocabulary, features=features.settings)


def sound(n, seed=1):
    """Noise whose loudness and colour change, so that features differ from moment to moment."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(n) / RATE
    return 0.1 * torch.randn(n, generator=generator) * (1.2 + torch.sin(11 * t)) + 0.3 * torch.sin(2 * math.pi * (300 + 250 * torch.sin(5 * t)) * t)


def cut(waveform, sizes):
    first = 0
    for size in sizes:
        yield waveform[first : first + size]
        first += size
    yield waveform[first:]


def sent(live, waveform, sizes=()):
    live.start()
    heard = [live.accept(block) for block in cut(waveform, sizes)] + [live.finish()]
    assert live.words == tuple(word for part in heard for word in part.words)
    return live.words


def steps_of_the_whole(recogniser, waveform):
    """The model's own masked forward over the whole, a generous silence behind it, cut to the real steps."""
    n_frames = 1 + (len(waveform) - 400) // 160
    padded = torch.cat([waveform, torch.zeros(24_000)])
    padded = padded + floor_noise(0, len(padded))
    mel, lengths = recogniser.features(padded[None], torch.tensor([len(padded)]))
    with torch.no_grad():
        out, _ = recogniser.model(normalise_running(mel, lengths), lengths)
    return out[:, : ((n_frames - 7) // 2 + 1) // 2]


def words_of_the_whole(recogniser, waveform, way, beam=4):
    """The recogniser's own ways of reading, over the steps of the whole."""
    out, model = steps_of_the_whole(recogniser, waveform), recogniser.model
    never = tuple(range(1, len(recogniser.vocabulary) - len(recogniser.vocabulary.symbols)))
    read = {"ctc": model._by_ctc, "transducer": model._by_transducer}[way]
    with torch.no_grad():
        found = read(out, torch.tensor([out.shape[1]]), 1 if way == "ctc" else beam, never, 3)[0]
    return tuple(Word(text, first * 0.04, (last + 1) * 0.04) for text, first, last in words_of(found, recogniser.vocabulary))


class TestFeatures:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 9000), st.lists(st.integers(0, 3000), max_size=12), st.sampled_from([(25.0, 10.0, 512), (20.0, 20.0, 512), (10.0, 25.0, 256), (32.0, 7.0, 512)]))
    def test_equal_the_whole_for_blocks_of_any_size(self, n, sizes, shape):
        window_ms, hop_ms, n_fft = shape
        features = LogMel(n_bins=20, window_ms=window_ms, hop_ms=hop_ms, n_fft=n_fft)
        waveform = sound(n)
        one = FeatureStream(features)
        frames = torch.cat([one.accept(block) for block in cut(waveform, sizes)])
        if n < len(features.window):
            assert len(frames) == 0
            return
        whole, lengths = features(waveform[None], torch.tensor([n]))
        assert len(frames) == int(lengths[0])
        torch.testing.assert_close(frames, whole[0], atol=1e-5, rtol=0)

    def test_by_hand(self):
        one = FeatureStream(LogMel(n_bins=20))
        assert [len(one.accept(torch.zeros(n))) for n in (399, 1, 159, 1, 480)] == [0, 1, 0, 1, 3] and len(one.waiting) == 1040 - 5 * 160

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_a_refused_block_leaves_no_trace(self, wrong):
        waveform, one = sound(3000), FeatureStream(LogMel(n_bins=20))
        first = one.accept(waveform[:1000])
        with pytest.raises(AudioError, match="the block of sound holds 1 values that are NaN or infinite.*at sample 3"):
            one.accept(torch.tensor([0.0, 0.0, 0.0, wrong, 0.0]))
        frames = torch.cat([first, one.accept(waveform[1000:])])
        torch.testing.assert_close(frames, LogMel(n_bins=20)(waveform[None], torch.tensor([3000]))[0][0], atol=1e-5, rtol=0)

    @given(st.integers(0, 40_000), st.integers(0, 40_000))
    @settings(max_examples=20, deadline=None)
    def test_noise_is_one_sequence(self, first, n):
        assert torch.equal(floor_noise(first, n), floor_noise(0, first + n)[first:])

    def test_noise_is_as_loud_as_the_recognisers(self):
        assert 20 * math.log10(floor_noise(0, 48_000).square().mean().sqrt()) == pytest.approx(-80, abs=0.2)
        assert not torch.equal(floor_noise(0, 100), floor_noise(16_000, 100))  # it does not repeat


class TestBestPath:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 8), max_size=8), st.integers(0, 3))
    def test_equals_greedy_over_the_whole(self, path, sizes, blank):
        log_probs = torch.log_softmax(3.0 * torch.eye(4)[path] + 0.1 * torch.arange(4), dim=-1).reshape(-1, 4)
        never = tuple({1, 2} - {blank})[:1]
        reader, found = BestPath(lambda x: x, blank=blank, never=never), []
        for piece in cut(log_probs, sizes):
            found += reader.feed(piece)
        whole = ctc_greedy(log_probs[None], torch.tensor([len(path)]), blank=blank, never=never)[0]
        assert found + reader.rest() == [(token, *span) for token, span in zip(whole.tokens, whole.spans)]

    def test_an_open_run_is_not_certain(self):
        reader = BestPath(lambda x: x, blank=0)
        assert reader.feed(torch.eye(3)[[1, 1]].log_softmax(-1)) == [] and reader.rest() == [(1, 0, 1)]
        assert reader.feed(torch.eye(3)[[1, 0]].log_softmax(-1)) == [(1, 0, 2)] and reader.rest() == []

    def test_nan(self):
        with pytest.raises(ArithmeticError, match="after step 0 hold NaN"):
            BestPath(lambda x: x, blank=0).feed(torch.full((1, 3), math.nan))


class TestCertainBeam:
    def parts(self, seed):
        torch.manual_seed(seed)
        decoder, joiner = Decoder(6, 8, 0, 2), Joiner(5, 8, 8, 6)
        with torch.no_grad():
            joiner.output_linear.weight.mul_(8)
            joiner.output_linear.bias[0] += 1.0
        return decoder.eval(), joiner.eval()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.integers(0, 25), st.lists(st.integers(0, 7), max_size=6), st.sampled_from([1, 2, 4]))
    def test_equals_the_search_over_the_whole(self, seed, n, sizes, beam):
        decoder, joiner = self.parts(seed)
        x = 2 * torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
        make = lambda: TransducerSearch(decoder, joiner, beam=beam, max_symbols=2)
        reader, found = CertainBeam(make()), []
        for piece in cut(x, sizes):
            found += reader.feed(piece)
            assert all(len(tokens) >= reader.given for tokens in reader.state.texts)
        search = make()
        best = search.results(search.feed(x, search.start()))[0]
        assert found + reader.rest() == [(token, step, step) for token, step in zip(best.tokens, best.steps)]

    def test_what_is_certain_is_forgotten(self):
        decoder, joiner = self.parts(0)
        x = 2 * torch.randn(300, 5, generator=torch.Generator().manual_seed(3))
        reader, n, longest = CertainBeam(TransducerSearch(decoder, joiner, beam=4, max_symbols=2)), 0, 0
        for piece in x.split(5):
            n += len(reader.feed(piece))
            longest = max(longest, *map(len, reader.state.texts))
        assert n > 40 and longest < n / 2

    def test_with_one_text_everything_is_certain(self):
        decoder, joiner = self.parts(1)
        reader = CertainBeam(TransducerSearch(decoder, joiner, beam=1))
        assert reader.feed(2 * torch.randn(300, 5, generator=torch.Generator().manual_seed(3))) and reader.rest() == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["letters", "words", "subwords"]), st.lists(st.integers(4, 10), max_size=14), st.lists(st.integers(0, 4), max_size=6))
def test_words_equal_those_of_the_whole(kind, symbols, sizes):
    vocabulary = {"letters": CharacterVocabulary("ab cd"), "words": WordVocabulary(["a", "b", "c", "d", "e"]), "subwords": SUBWORDS}[kind]
    found = [(symbol if symbol < len(vocabulary) else 5, 2 * i, 2 * i + 1) for i, symbol in enumerate(symbols)]
    words, out = _Words(vocabulary), []
    for piece in cut(found, sizes):
        out += words.feed(piece)
    assert out + words.rest([]) == words_of(found, vocabulary)


SUBWORDS = SubwordVocabulary.train(["abc abd", "bad cab dab", "a b c d"], 5 + 11)


class TestTheWhole:
    @pytest.mark.parametrize("way", ["ctc", "transducer"])
    @pytest.mark.parametrize("vocabulary", [CharacterVocabulary("abc "), WordVocabulary(["one", "two", "three"])], ids=["letters", "words"])
    def test_same_words_and_times_for_blocks_of_any_size(self, way, vocabulary):
        recogniser = made("ctc+transducer", vocabulary)
        live, waveform = LiveRecogniser(recogniser, way=way), sound(50_000)
        expected = words_of_the_whole(recogniser, waveform, way)
        assert len(expected) >= 2 and sum(len(word.text) for word in expected) >= 10, "a test of nothing"
        generator = torch.Generator().manual_seed(5)
        for longest in (300, 2000, 20_000, 60_000):
            sizes = torch.randint(0, longest, (200,), generator=generator).tolist()
            assert sent(live, waveform, sizes) == expected

    def test_encoder_output(self):
        recogniser = made()
        live, waveform = LiveRecogniser(recogniser), sound(30_000)
        out, whole = [live._encoded(block) for block in cut(waveform, [7, 9000, 1, 4000])], steps_of_the_whole(recogniser, waveform)[0]
        out = torch.cat([*out, live._encoded(torch.zeros(live.silence_behind(30_000)))])[: len(whole)]
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=0)
        assert whole.std(dim=0).max() > 0.1

    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 12_000), st.lists(st.integers(0, 3000), max_size=4))
    def test_sounds_of_any_length(self, n, sizes):
        waveform = sound(n)
        expected = words_of_the_whole(CTC, waveform, "ctc") if n >= 400 + 8 * 160 else ()  # nine frames make one step
        assert sent(LIVE, waveform, sizes) == expected

    def test_another_chunk(self):
        model = ZipformerRecogniser(replace(CTC.model.config, chunk_size=(16,), left_context_frames=(32,)))
        model.load_state_dict(CTC.model.state_dict())
        recogniser = Recogniser(model, CTC.vocabulary, features=CTC.features.settings)
        live = LiveRecogniser(CTC, chunk_size=16, left_context=32)
        waveform = sound(40_000)
        assert sent(live, waveform, [5000] * 7) == words_of_the_whole(recogniser, waveform, "ctc") != sent(LIVE, waveform)

    def test_a_source_at_another_rate(self):
        waveform = sound(60_000)  # taken as 44,100 Hz
        resampled = torch.from_numpy(soxr.resample(waveform.numpy(), 44_100, RATE))
        live = LiveRecogniser(CTC, sample_rate=44_100)
        expected = words_of_the_whole(CTC, resampled, "ctc")
        for sizes in ([], [441] * 130, [1, 20_000, 7]):
            assert sent(live, waveform, sizes) == expected
        assert live.seconds == 60_000 / 44_100 and len(expected) >= 2

    def test_the_resampler_gives_everything_in_the_end(self, monkeypatch):
        live, came = LiveRecogniser(CTC, sample_rate=44_100), []
        encoded = live._encoded
        monkeypatch.setattr(live, "_encoded", lambda samples: (came.append(samples), encoded(samples))[1])
        sent(live, sound(30_000), [441] * 60)
        torch.testing.assert_close(torch.cat(came[:-1]), torch.from_numpy(soxr.resample(sound(30_000).numpy(), 44_100, RATE)), atol=1e-6, rtol=0)
        assert not came[-1].any()

    def test_nothing_that_was_certain_changes_and_partial_words_follow(self):
        live, waveform = LiveRecogniser(made("transducer")), sound(50_000)
        expected, seen = sent(live, waveform), ()
        live.start()
        for block in waveform.split(1000):
            heard = live.accept(block)
            seen += heard.words
            assert seen == live.words == expected[: len(seen)]
            assert all(word.start >= seen[-1].start for word in heard.partial) if seen else True
        assert seen + live.finish().words == expected and live.transcript.text == " ".join(word.text for word in expected)

    def test_the_model_is_left_as_it_was(self):
        recogniser = made()
        before = recogniser.model.model.encoder.chunk_size
        sent(LiveRecogniser(recogniser, chunk_size=16, left_context=16), sound(9000))
        assert recogniser.model.model.encoder.chunk_size == before == (8, 16, -1)


CTC = made()
LIVE = LiveRecogniser(CTC)


class TestRefusals:
    def test_models_that_cannot_stream(self):
        with pytest.raises(ValueError, match="this ZipformerRecogniser was not trained for streams.*speechlearn train --model zipformer --causal"):
            LiveRecogniser(made(causal=False))
        other = Recogniser(nn.Linear(1, 1), CharacterVocabulary("a"))
        with pytest.raises(ValueError, match="this Linear was not trained for streams"):
            LiveRecogniser(other)
        with pytest.raises(ValueError, match="way is 'ctc', and this model has attention. An attention decoder wants the whole sound first"):
            LiveRecogniser(made("attention", attention_dim=16, n_decoder_heads=2, decoder_feedforward=16, n_decoder_layers=1))
        with pytest.raises(ValueError, match="way is 'transducer', and this model has ctc"):
            LiveRecogniser(CTC, way="transducer")

    def test_sizes(self):
        with pytest.raises(ValueError, match="left_context_frames is 16; a stream needs a multiple of its chunk_size, 12"):
            LiveRecogniser(CTC, chunk_size=12)
        with pytest.raises(ValueError, match="trained with whole utterances only; say which chunk_size to use"):
            LiveRecogniser(made(chunk_size=(-1,)))

    @pytest.mark.parametrize("rate", [RATE, 44_100])
    @pytest.mark.parametrize(("block", "message"), [([0.0, math.nan], "NaN or infinite"), ([1, 2], "expected floating point"), ([[0.0]], "expected one axis")])
    def test_a_refused_block_loses_nothing(self, rate, block, message):
        live, waveform = LiveRecogniser(CTC, sample_rate=rate), sound(40_000)
        expected = sent(live, waveform)
        live.start()
        live.accept(waveform[:15_000])
        with pytest.raises(AudioError, match=message):
            live.accept(torch.tensor(block))
        assert live.seconds == 15_000 / rate
        live.accept(waveform[15_000:])
        live.finish()
        assert live.words == expected != ()

    def test_the_end_is_the_end(self):
        live = LiveRecogniser(CTC)
        live.finish()
        for call in (live.finish, lambda: live.accept(torch.zeros(5))):
            with pytest.raises(ValueError, match=r"this sound has ended; call start\(\) before the next one"):
                call()
        live.start()
        assert live.accept(torch.zeros(0)) == Heard() and live.seconds == 0


class Scripted(LiveRecogniser):
    """Says what it is told, block by block, and takes a given time for each."""

    def __init__(self, clock, said, costs):
        self.sample_rate = 100
        self.clock, self.said, self.costs, self.n, self.words = clock, list(said), list(costs), 0, ()

    @property
    def seconds(self):
        return self.n / 100

    @property
    def transcript(self):
        return Transcript(" ".join(word.text for word in self.words), self.words)

    def _next(self):
        self.clock.now += self.costs.pop(0)
        heard = self.said.pop(0)
        self.words += heard.words
        return heard

    def accept(self, block):
        self.n += len(block)
        return self._next()

    def finish(self):
        return self._next()


class Clock:
    """A clock that moves only when told."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 50.0, []
        monkeypatch.setattr(live_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(live_module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


ONE, TWO, TEN = Word("one", 0.0, 0.5), Word("two", 0.5, 1.5), Word("ten", 0.5, 1.5)
SAID = [Heard(), Heard((), (ONE, TEN)), Heard((ONE,), (TWO,)), Heard((TWO,), ())]  # blocks of one second; "ten" becomes "two"


class TestTheClock:
    def test_reckoned_by_hand(self, clock):
        heard = listen(Scripted(clock, SAID, [0.25, 0.25, 1.5, 0.5]), [torch.zeros(100)] * 3)
        # The second block is there at 2.0 and done at 2.25, with "one"; the third at 3.0, done at 4.5, with "two"; the end waits for it, and is done at 5.0.
        assert heard.shown == (2.25, 4.5) and heard.ended == (0.5, 1.5) and heard.latencies == (1.75, 3.0)
        assert heard.seconds_audio == 3.0 and heard.seconds_compute == 2.5 and heard.real_time_factor == pytest.approx(2.5 / 3)
        assert heard.transcript.text == "one two" and clock.slept == []

    def test_a_late_block_waits_for_the_one_before(self, clock):
        said = [Heard(), Heard((), (ONE,)), Heard((ONE,)), Heard((TWO,))]
        assert listen(Scripted(clock, said, [0.25, 0.25, 1.5, 0.5]), [torch.zeros(100)] * 3).shown == (2.25, 5.0)

    def test_at_the_speed_of_sound(self, clock):
        heard = listen(Scripted(clock, SAID, [0.25, 0.25, 1.5, 0.5]), [torch.zeros(100)] * 3, pace="real")
        assert clock.slept == [1.0, 0.75, 0.75] and heard.shown == (2.25, 4.5) and heard.ended == (0.5, 1.5)

    def test_as_it_comes(self, clock):
        def blocks():
            for wait in (1.25, 1.0, 1.0):
                clock.now += wait
                yield torch.zeros(100)
            raise KeyboardInterrupt

        heard = listen(Scripted(clock, SAID, [0.0, 0.25, 0.25, 0.5]), blocks(), pace="live")
        # Blocks are there at 1.25, 2.25 and (computing between) 3.5 s: the middle of the first was there at 0.75, of the second at 1.75.
        assert heard.ended == (0.75, 1.75) and heard.shown == (2.5, 3.75) and heard.seconds_audio == 3.0

    def test_ctrl_c_stops_a_file(self, clock):
        def blocks():
            yield torch.zeros(100)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            listen(Scripted(clock, SAID, [0.0] * 4), blocks())

    def test_nothing_at_all(self):
        LIVE.start()
        heard = listen(LIVE, [])
        assert heard.transcript == Transcript("") and heard.latencies == () and math.isnan(heard.real_time_factor)
        with pytest.raises(ValueError, match="pace is 'fast'; choose reckoned, real or live"):
            listen(LIVE, [], pace="fast")

    def test_a_true_recogniser(self):
        LIVE.start()
        seen = []
        heard = listen(LIVE, sound(50_000).split(640), show=seen.append)
        assert heard.transcript.words == words_of_the_whole(CTC, sound(50_000), "ctc") == tuple(word for part in seen for word in part.words)
        assert len(heard.shown) == len(heard.ended) == len(heard.transcript.words) and list(heard.shown) == sorted(heard.shown)
        assert heard.ended == pytest.approx([word.end for word in heard.transcript.words])
        # No word before the chunk with its first step could be computed: 13 frames beyond its end, and the last one's 25 ms less a hop.
        for word, shown in zip(heard.transcript.words, heard.shown):
            assert shown >= 0.16 * (math.floor(word.start / 0.16 + 1e-6) + 1) + 0.145 - 1e-6 or shown >= heard.seconds_audio

    def test_the_figure_shows_each_word(self):
        three = Word("three", 1.5, 2.0)
        ax = plot_listening(Listening(Transcript("one two three", (ONE, TWO, three)), (0.5, 1.5, 2.0), (2.25, 4.5, 4.5), 3.0, 2.5), truth=[Word("one", 0.1, 0.7)])
        labels = [(text.get_text(), text.get_position()[0]) for text in ax.texts if text.get_text()]
        assert labels == [("one", 2.25), ("two three", 4.5), ("one", pytest.approx(0.4))] and ax.get_xlim()[1] > 4.5
        assert [line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata()) for line in ax.lines] == [[0.0, 0.5], [0.5, 1.5], [1.5, 2.0], [0.1, 0.7]]


class Dribble(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data, sizes):
        self.data, self.sizes, self.i = data, sizes, 0

    def read(self, n=-1):
        got, self.data = self.data[:n], self.data[n:]
        return got

    def read1(self, n=-1):
        self.i += 1
        return self.read(min(n, self.sizes[self.i % len(self.sizes)]))


SAMPLES = (sound(5000).clamp(-1, 1) * 32767).round().to(torch.int16)


def as_wav(samples, rate=RATE, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples.numpy().tobytes())
    return file.getvalue()


class TestPipes:
    @pytest.mark.parametrize("sizes", [[1], [3, 2], [4096], [7, 1, 640]])
    @pytest.mark.parametrize("tail", [b"", b"\x01"], ids=["whole", "half a sample at the end"])
    def test_raw_samples(self, sizes, tail):
        rate, blocks = pcm(Dribble(SAMPLES.numpy().tobytes() + tail, sizes))
        assert rate == RATE and torch.equal(torch.cat(list(blocks)), SAMPLES.float() / 32768)

    def test_wav_as_soundfile_reads_it(self, tmp_path):
        data = as_wav(SAMPLES, rate=22_050)
        rate, blocks = pcm(Dribble(data, [11, 2]))
        (tmp_path / "x.wav").write_bytes(data)
        import soundfile

        expected, expected_rate = soundfile.read(tmp_path / "x.wav", dtype="float32")
        assert rate == expected_rate == 22_050 and torch.equal(torch.cat(list(blocks)), torch.from_numpy(expected))

    def test_two_samples(self):
        assert torch.equal(torch.cat(list(pcm(io.BytesIO(b"\x00\x40\x00\xc0"))[1])), torch.tensor([0.5, -0.5]))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "nothing came from standard input"), (as_wav(SAMPLES, channels=2), r"2 channel\(s\) of 16 bits"), (as_wav(SAMPLES, width=4), r"1 channel\(s\) of 32 bits"),
            (b"fLaC" + bytes(100), "holds a compressed file"), (as_wav(SAMPLES)[:36], "ends before its samples"),
        ],
    )
    def test_what_cannot_be_heard(self, data, message):
        with pytest.raises(AudioError, match=message):
            pcm(io.BytesIO(data))


class FakeSoundDevice(types.ModuleType):
    """Gives three blocks when it is opened, the second one with the flag that samples were lost; then somebody presses Ctrl-C."""

    class PortAudioError(Exception):
        pass

    def __init__(self, broken=False):
        super().__init__("sounddevice")
        self.asked, self.closed, fake = None, False, self

        class InputStream:
            def __init__(self, **asked):
                fake.asked = asked
                if broken:
                    raise FakeSoundDevice.PortAudioError("no device")

            def __enter__(self):
                for k, lost in enumerate((False, True, False)):
                    block = (SAMPLES[640 * k : 640 * (k + 1), None].float() / 32768).numpy().copy()
                    fake.asked["callback"](block, 640, None, lost)
                    block[:] = 0  # the sound card uses its memory again

            def __exit__(self, *error):
                fake.closed = True

        self.InputStream = InputStream


class TestMicrophone:
    def test_blocks_as_they_come(self, monkeypatch):
        fake, lost = FakeSoundDevice(), []
        monkeypatch.setitem(sys.modules, "sounddevice", fake)
        source = microphone(RATE, on_lost=lambda: lost.append(1))
        got = [next(source) for _ in range(3)]
        source.close()
        assert torch.equal(torch.cat(got), SAMPLES[:1920].float() / 32768) and lost == [1] and fake.closed
        assert {name: fake.asked[name] for name in ("samplerate", "channels", "dtype", "blocksize")} == {"samplerate": RATE, "channels": 1, "dtype": "float32", "blocksize": 640}

    def test_no_package_and_no_device(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(AudioError, match="pip install sounddevice. Without it: arecord"):
            next(microphone(RATE))
        monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice(broken=True))
        with pytest.raises(AudioError, match="the microphone cannot be used: no device"):
            next(microphone(RATE))


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("live")
        save_checkpoint(folder / "model", CTC.model, vocabulary=CTC.vocabulary, features=CTC.features.settings)
        save(folder / "said.wav", sound(50_000).clamp(-1, 1), RATE)
        return folder

    @pytest.fixture
    def run(self, capsys):
        def run(*arguments):
            try:
                code = main(["stream", *map(str, arguments)])
            except SystemExit as stop:
                code = stop.code
            return code, *capsys.readouterr()

        return run

    def expected(self, folder):
        from speechlearn.sound.waveform import load

        return words_of_the_whole(CTC, load(folder / "said.wav", RATE), "ctc")

    def test_a_file(self, run, folder):
        words = self.expected(folder)
        code, out, err = run("--checkpoint", folder / "model", folder / "said.wav")
        assert code == 0 and out == " ".join(word.text for word in words) + "\n" and len(words) > 2
        assert "3.12 s of sound" in err and "real-time factor" in err and "the first word stood there" in err and "(reckoned)" in err
        code, out, err = run("--checkpoint", folder / "model", folder / "said.wav", "--json")
        answer = json.loads(out)
        assert code == 0 and err == "" and answer["text"] == " ".join(word.text for word in words) and answer["seconds_audio"] == 3.125 and answer["clock"] == "reckoned"
        assert [(w["text"], w["start"], w["end"]) for w in answer["words"]] == [(w.text, round(w.start, 3), round(w.end, 3)) for w in words]
        assert answer["first_word_latency"] == pytest.approx(answer["words"][0]["shown"] - answer["words"][0]["end"], abs=2e-3) and answer["real_time_factor"] > 0

    def test_a_pipe(self, run, folder, monkeypatch):
        words = " ".join(word.text for word in self.expected(folder))
        data = (folder / "said.wav").read_bytes()
        for piped in (data, data[44:]):
            monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(piped)))
            code, out, err = run("--checkpoint", folder / "model", "-")
            assert code == 0 and out == words + "\n" and "3.12 s of sound" in err

    def test_at_the_speed_of_sound(self, run, folder, clock):
        code, out, err = run("--checkpoint", folder / "model", folder / "said.wav", "--real-time", "--json")
        assert code == 0 and json.loads(out)["clock"] == "real" and sum(clock.slept) == pytest.approx(3.125)

    def test_a_microphone_until_ctrl_c(self, run, folder, monkeypatch):
        def speaks(rate, on_lost):
            yield from sound(50_000).clamp(-1, 1).split(640)
            on_lost()
            raise KeyboardInterrupt

        monkeypatch.setattr(live_module, "microphone", speaks)
        code, out, err = run("--checkpoint", folder / "model", "--microphone")
        assert code == 0 and len(out.split()) == len(words_of_the_whole(CTC, sound(50_000).clamp(-1, 1), "ctc")) and "has lost samples" in err and "s of sound" in err

    def test_a_terminal_shows_what_may_change(self, folder):
        from speechlearn.cli import _Screen

        class Terminal(io.StringIO):
            isatty = lambda self: True

        out = Terminal()
        screen = _Screen(out)
        screen.show(Heard((), (ONE, TEN)))
        screen.show(Heard((ONE,), (TWO,)))
        screen.show(Heard((TWO,), ()))
        assert on_screen(out.getvalue()) == "one two" and on_screen(out.getvalue()[: out.getvalue().index("\x1b[K", 4)]) == "one ten"

    def test_what_is_missing(self, run, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("speechlearn.checkpoint.list_checkpoints", lambda: ["digits"])
        code, out, err = run(folder / "said.wav")
        assert code == 1 and out == "" and "without a checkpoint 'stream'" in err and "speechlearn train --model zipformer --causal" in err
        code, out, err = run("--checkpoint", "digits", folder / "said.wav")
        assert code == 1 and "was not trained for streams" in err
        code, out, err = run("--checkpoint", folder / "model", "nothing.wav")
        assert code == 1 and "there is no file 'nothing.wav'" in err
        assert run("--checkpoint", folder / "model")[0] == 2 and run("--checkpoint", folder / "model", "x.wav", "--microphone")[0] == 2


def on_screen(text):
    """What a terminal shows after this: one line, with "erase to the right" and "cursor to the left"."""
    import re

    line, column = [], 0
    for part in re.findall(r"\x1b\[K|\x1b\[\d+D|.", text, re.S):
        if part == "\x1b[K":
            del line[column:]
        elif part.startswith("\x1b"):
            column -= int(part[2:-1])
        else:
            line[column : column + 1] = [part]
            column += 1
    return "".join(line)


def test_resample_agrees_with_blocks():
    """`resample` of the whole is what the stream's resampler gives; else the test at 44.1 kHz would compare two mistakes."""
    waveform = sound(20_000)
    assert torch.equal(resample(waveform, 44_100, RATE), torch.from_numpy(soxr.resample(waveform.numpy(), 44_100, RATE)))
