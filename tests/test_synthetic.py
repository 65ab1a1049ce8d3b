"""data.espeak and data.synthetic: reproducible speech, honest splits, a cache that cannot be half made."""
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from speechlearn.data import espeak, synthetic
from speechlearn.data.corpora import Corpus
from speechlearn.data.espeak import Request, SynthesisError, is_available, sha256_of, speak
from speechlearn.data.synthetic import (
    SLOTS, TEMPLATES, TEST_VOICES, TRAIN_VOICES, count_sentences, draw_request, fill, load_corpus, make_corpus, sampler, split_of_sentence, with_pauses,
)
from speechlearn.sound.waveform import peak_db
from speechlearn.text import CharacterVocabulary

needs_espeak = pytest.mark.skipif(not is_available(), reason="espeak-ng is not installed")


def test_sampler_ships_with_the_package():
    corpus = sampler()
    assert len(corpus) == 16 and 30 <= corpus.seconds <= 60 and len(corpus.speakers) == 16
    for utterance in corpus:
        x = utterance.waveform()
        assert abs(len(x) / 16_000 - utterance.seconds) < 0.05 and peak_db(x) > -30
        assert " ".join(w.text for w in utterance.words) == utterance.text
        assert all(0 <= w.start < w.end <= utterance.seconds + 0.01 for w in utterance.words)
    folder = os.path.dirname(corpus[0].source.path)
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 400_000


def test_sentences_are_counted_by_enumeration():
    for template in (TEMPLATES[0], "(a|b {please}c) d", "{room}{please}"):
        draws = {fill(template, random.Random(i)) for i in range(6000)}
        assert len(draws) == count_sentences(template)


def test_grammar_keeps_to_its_alphabet_and_has_no_homophone_traps():
    vocabulary = CharacterVocabulary()
    words = set()
    for i in range(3000):
        text = draw_request("commands", "train", i).text
        vocabulary.encode(text)
        assert "  " not in text and text == text.strip()
        words |= set(text.split())
    assert 150 < len(words) < 260 and not words & {"too", "ate", "won"}
    assert "two" in words and "to" in words and "four" in words and "for" in words


def test_splits_share_neither_voices_nor_sentences():
    drawn = {split: [draw_request("commands", split, i) for i in range(400)] for split in ("train", "dev", "test")}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not {r.text for r in drawn[a]} & {r.text for r in drawn[b]}
        assert not {r.voice.split("+")[1] for r in drawn[a]} & {r.voice.split("+")[1] for r in drawn[b]}
    for i in range(50):
        assert draw_request("commands", "seen-voice", i).voice.split("+")[1] in TRAIN_VOICES
        seen = draw_request("commands", "seen-sentence", i)
        assert seen.text == drawn["train"][i].text and seen.voice.split("+")[1] in TEST_VOICES


def test_digits_of_three_and_more_are_divided_and_lengths_stay_even():
    for split in ("train", "test"):
        texts = [draw_request("digits", split, i).text for i in range(700)]
        assert all(split_of_sentence(t) == split for t in texts if len(t.split()) > 2)
        counts = [sum(len(t.split()) == k for t in texts) for k in range(1, 8)]
        assert min(counts) > 60 and max(counts) < 145


def test_requests_follow_from_their_arguments():
    assert draw_request("digits", "train", 5) == draw_request("digits", "train", 5) != draw_request("digits", "train", 5, seed=1)
    code = "from speechlearn.data.synthetic import draw_request; print(draw_request('commands', 'dev', 3))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout.strip() == str(draw_request("commands", "dev", 3))


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no synthetic corpus 'letters'"):
        make_corpus("letters")
    with pytest.raises(ValueError, match="no split 'valid'"):
        make_corpus("digits", "valid")
    with pytest.raises(ValueError, match="n is 0"):
        make_corpus("digits", n=0)
    with pytest.raises(ValueError, match="no corpus 'letters'; choose"):
        load_corpus("letters")
    with pytest.raises(ValueError, match="read from a folder of yours"):
        load_corpus("librispeech")
    with pytest.raises(ValueError, match="text is empty"):
        Request("  ")
    with pytest.raises(ValueError, match="rate is 20; expected 80 to 450"):
        Request("a", rate=20)


def test_without_espeak_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak.ctypes.util, "find_library", lambda name: None)
    assert not espeak.is_available()
    with pytest.raises(SynthesisError, match=r'pip install "speechlearn\[synth\]".*sampler'):
        espeak.find_espeak()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPEECHLEARN_CACHE", str(tmp_path))
    assert synthetic.cache_folder() == tmp_path
    monkeypatch.delenv("SPEECHLEARN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert synthetic.cache_folder() == tmp_path / "x" / "speechlearn"


def test_pauses_shift_words_and_keep_every_sample():
    utterance = sampler()[0]
    paused = with_pauses(utterance, random.Random(1), share=1.0)
    before, after = utterance.waveform(), paused.waveform()
    assert len(after) > len(before) and abs(len(after) / 16_000 - len(before) / 16_000 - sum(paused.source.pauses)) < 0.01
    assert after[after != 0].shape[0] >= before[before != 0].shape[0] - 1 and torch.equal(after[after != 0], before[before != 0])
    assert [w.text for w in paused.words] == [w.text for w in utterance.words]
    gaps = [b.start - a.start - (d.start - c.start) for a, b, c, d in zip(paused.words, paused.words[1:], utterance.words, utterance.words[1:])]
    assert gaps == pytest.approx(list(paused.source.pauses), abs=1e-3)
    assert with_pauses(utterance, random.Random(1), share=0.0) is utterance


@needs_espeak
def test_two_processes_make_the_same_bytes(tmp_path):
    requests = [Request("four two", "en-us+f2"), Request("nine", "en-gb-scotland+m3", pitch=30)]
    first = speak(requests, tmp_path / "a.flac", seed=1)
    assert speak(requests, tmp_path / "b.flac", seed=1) == first
    assert sha256_of(tmp_path / "a.flac") == sha256_of(tmp_path / "b.flac")


@needs_espeak
def test_a_voice_that_does_not_exist_is_refused(tmp_path):
    for voice in ("en-us+nosuch", "xx-yy", "en-us+../../etc"):
        with pytest.raises(SynthesisError, match="has no voice"):
            speak([Request("hello", voice)], tmp_path / "x.flac")


@needs_espeak
def test_a_long_data_path_does_not_end_anything(tmp_path, monkeypatch):
    library, data = espeak.find_espeak()
    long = tmp_path / ("d" * 100) / ("e" * 60)
    long.mkdir(parents=True)
    (long / "espeak-ng-data").symlink_to(data)
    monkeypatch.setattr(espeak, "find_espeak", lambda: (library, str(long / "espeak-ng-data")))
    assert speak([Request("hello")], tmp_path / "x.flac")[0]["samples"] > 1000


@needs_espeak
def test_a_helper_that_fails_is_an_error_here(tmp_path, monkeypatch):
    library, data = espeak.find_espeak()
    monkeypatch.setattr(espeak, "find_espeak", lambda: ("no-such-library.so", data))
    with pytest.raises(SynthesisError, match="helper process.*no-such-library"):
        speak([Request("hello")], tmp_path / "x.flac")


@needs_espeak
def test_corpus_is_kept_repaired_and_extended(tmp_path):
    corpus = make_corpus("tiny", "dev", n=4, cache=tmp_path)
    assert isinstance(corpus, Corpus) and len(corpus) == 4
    shard = next(tmp_path.rglob("*.flac"))
    made = shard.stat().st_mtime_ns
    longer = make_corpus("tiny", "dev", n=16, cache=tmp_path)
    assert shard.stat().st_mtime_ns == made and longer.utterances[:4] == corpus.utterances
    for utterance in longer:
        assert abs(len(utterance.waveform()) / 16_000 - utterance.seconds) < 1e-3
        assert [w.text for w in utterance.words] == utterance.text.split()
        starts = [w.start for w in utterance.words]
        assert starts == sorted(starts) and utterance.words[-1].end <= utterance.seconds + 1e-3
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])  # damaged: made again, with the same bytes
    make_corpus("tiny", "dev", n=4, cache=tmp_path)
    assert shard.read_bytes() == content
    index = next(tmp_path.rglob("*.json"))
    index.write_text(json.dumps({"fingerprint": "of something else"}))
    make_corpus("tiny", "dev", n=4, cache=tmp_path)
    assert "sha256" in json.loads(index.read_text()) and not list(tmp_path.rglob("*.part"))


@needs_espeak
def test_two_processes_at_once_do_not_disturb_each_other(tmp_path):
    code = f"from speechlearn.data.synthetic import make_corpus; c = make_corpus('tiny', 'test', n=16, cache={str(tmp_path)!r}); print(float(c[3].waveform().sum()))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and outputs[0] == outputs[1]


@needs_espeak
def test_no_room_and_no_rights(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SynthesisError, match="cannot be made"):
        make_corpus("tiny", "dev", n=4, cache=tmp_path / "file")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic.os, "replace", full)
    with pytest.raises(SynthesisError, match="No space left on device.*SPEECHLEARN_CACHE"):
        make_corpus("tiny", "dev", n=4, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.part"))
