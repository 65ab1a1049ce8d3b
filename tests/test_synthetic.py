"""data.espeak and data.synthetic: reproducible speech, honest splits, a cache that cannot be half made."""
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from speechlearn.data import espeak, synthetic
from speechlearn.data.corpora import Corpus
from speechlearn.data.espeak import Request, SynthesisError, is_available, sha256_of, speak
from speechlearn.data.synthetic import (
    SLOTS, TEMPLATES, TEST_VOICES, TRAIN_VOICES, count_sentences, draw_request, fill, hard_cut, load_corpus, loud_part, make_corpus, sampler, split_of_sentence, with_pauses,
)
from speechlearn.sound.waveform import load, peak_db, rms_db, save
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


def test_loud_part_by_hand():
    frames = torch.tensor([0.001, 0.1, 1.0, 0.001, 1.0, 0.3, 0.1, 0.001]).repeat_interleave(10)  # 8 frames of 10 ms at 1 kHz
    # mean square 2.11/8 = 0.264: −20 dB is 0.0026, so 0.1² = 0.01 stays and 0.001² goes; the quiet frame in the middle stays
    assert loud_part(frames, 1000, -20.0, shortest=0.0) == (10, 70)
    assert loud_part(frames, 1000, -10.0, shortest=0.0) == (20, 60)
    assert loud_part(frames, 1000, -10.0, shortest=0.05) == (0, 80)  # four frames would be left: not cut at all
    assert loud_part(torch.zeros(50), 1000, -10.0) == (0, 50)
    assert loud_part(torch.ones(7), 1000, -10.0) == (0, 7)


def test_hard_cut_mutes_edges_and_gaps_and_nothing_else():
    utterance = next(with_pauses(u, random.Random(1), share=1.0) for u in sampler()[:8] if len(u.words) > 3)
    cut = hard_cut(utterance, random.Random(2), share=1.0, edge_db=(-12.0, -12.0), noise_db=(-200.0, -200.0))
    before, after = utterance.waveform(), cut.waveform()
    assert cut.words == utterance.words and cut.seconds == utterance.seconds and len(after) == len(before)
    inside = torch.zeros(len(before), dtype=torch.bool)
    for word in utterance.words:
        start, end = round(word.start * 16_000), round(word.end * 16_000)
        first, last = loud_part(before[start:end], 16_000, -12.0)
        inside[start + first : start + last] = True
    assert 0.1 < inside.float().mean() < 0.9
    assert torch.allclose(after[inside], before[inside], atol=1e-6) and not after[~inside].any()


def test_hard_cut_noise_has_its_level_and_its_seed():
    utterance = sampler()[0]
    noisy = hard_cut(utterance, random.Random(2), share=1.0, edge_db=(-12.0, -12.0), noise_db=(-20.0, -20.0))
    clean = hard_cut(utterance, random.Random(2), share=1.0, edge_db=(-12.0, -12.0), noise_db=(-200.0, -200.0))
    a, b = noisy.waveform(), clean.waveform()
    assert torch.equal(a, noisy.waveform())
    word = max(utterance.words, key=lambda w: w.end - w.start)
    part = slice(round(word.start * 16_000), round(word.end * 16_000))
    ratio = 20 * torch.log10((a - b)[part].norm() / b[part].norm())
    assert ratio == pytest.approx(-20.0, abs=0.5)
    assert not (a - b)[b == 0].count_nonzero() > 0.01 * len(b)  # the noise stops where the word stops


def test_hard_cut_by_chance():
    utterance = sampler()[0]
    assert hard_cut(utterance, random.Random(1), share=0.0) is utterance
    assert hard_cut(replace(utterance, words=()), random.Random(1), share=1.0).source is utterance.source
    sources = [hard_cut(utterance, random.Random(i), share=0.5).source for i in range(200)]
    changed = [s for s in sources if s is not utterance.source]
    assert 70 < len(changed) < 130
    assert all(-30 <= s.edge_db <= -8 and -50 <= s.noise_db <= -6 for s in changed)


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


def test_voices_are_divided_by_families():
    groups = (synthetic.TRAIN_VOICES, synthetic.DEV_VOICES, synthetic.TEST_VOICES)
    assert [len(set(group)) for group in groups] == [66, 9, 11] and len(set().union(*groups)) == 86
    for family in synthetic.FAMILIES:
        assert [len(set(family) & set(group)) for group in groups].count(0) == 2, f"the family {family} is split"
    assert not set().union(*groups) & {"whisper", "whisperf", "fast", "UniRobot", "robosoft", "croak", "Demonic"}


def test_prosody_stays_in_its_bounds_and_every_template_is_heard():
    requests = [draw_request("commands", "train", i) for i in range(3000)]
    assert {min(r.rate for r in requests), max(r.rate for r in requests)} == {95, 165}
    for values in ([r.pitch for r in requests], [r.pitch_range for r in requests]):
        assert min(values) == 20 and max(values) == 80
    openings = ("turn", "set a timer", "alarm for", "wake", "make", "play", "what is the", "remind", "(call|send|read)", "add", "how far", "(open|close)",
                "(raise|lower|set the (volume|temp))", "the meeting", "my number", "what is [^t]")
    shares = [sum(bool(re.search(rf"\b{opening}", r.text)) for r in requests) / len(requests) for opening in openings]
    assert min(shares) > 0.002 and max(shares) < 0.25, dict(zip(openings, shares))


def test_word_times_by_hand():
    audio = np.full(1000, 500, np.int16)
    audio[900:] = 0  # the last word ends where the sound does, not where the file does
    # Positions count characters from 1; "at a" has one event, so its two words share the time until the next.
    assert espeak._word_times("at a time", [(1, 0), (6, 400)], audio, 1000) == [["at", 0.0, 0.2], ["a", 0.2, 0.4], ["time", 0.4, 0.9]]
    assert espeak._word_times("a ban a", [(1, 0), (3, 100), (7, 500)], audio, 1000) == [["a", 0.0, 0.1], ["ban", 0.1, 0.5], ["a", 0.5, 0.9]]
    assert espeak._word_times("one two", [], np.zeros(1000, np.int16), 1000) == [["one", 0.0, 0.5], ["two", 0.5, 1.0]]


def test_the_helper_starts_without_torch():
    code = "import sys; from speechlearn.data.espeak import _worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@needs_espeak
def test_every_voice_exists_speaks_and_is_its_own(tmp_path):
    accents, variants = espeak.voices_of(espeak.find_espeak()[1])
    voices = [*synthetic.TRAIN_VOICES, *synthetic.DEV_VOICES, *synthetic.TEST_VOICES]
    assert set(voices) <= variants and set(synthetic.ACCENTS) <= accents
    requests = [Request("seven", "en-us"), *(Request("seven", f"en-us+{voice}") for voice in voices), *(Request("tomato", accent) for accent in synthetic.ACCENTS)]
    index = speak(requests, tmp_path / "all.flac")
    sound = load(tmp_path / "all.flac", None)
    parts = [sound[p["start"] : p["start"] + p["samples"]] for p in index]
    for request, part in zip(requests, parts):
        assert 0.15 < len(part) / 16_000 < 1.5 and peak_db(part) > -30, request
    plain = parts[0]
    for voice, part in zip(voices, parts[1:]):  # an unknown variant would silently be the plain voice
        n = min(len(plain), len(part))
        assert abs(len(plain) - len(part)) > 80 or (plain[:n] - part[:n]).abs().max() > 0.05, voice


@needs_espeak
def test_lengths_suit_ctc_at_forty_milliseconds(tmp_path):
    corpus = make_corpus("tiny", "train", cache=tmp_path)
    for utterance in corpus:
        frames = (utterance.seconds * 1000 - 25) // 10 + 1
        text = utterance.text
        assert frames // 4 >= len(text) + sum(a == b for a, b in zip(text, text[1:])), utterance
    rate = sum(len(u.text) for u in corpus) / corpus.seconds
    assert 12 < rate < 16


@needs_espeak
def test_words_lie_where_the_sound_is(tmp_path):
    corpus = make_corpus("digits", "dev", n=40, cache=tmp_path)
    inside, silent = [], 0
    for utterance in corpus:
        x = utterance.waveform()
        assert [w.text for w in utterance.words] == utterance.text.split()
        if isinstance(utterance.source, synthetic.WithPauses):
            for before, after, pause in zip(utterance.words, utterance.words[1:], utterance.source.pauses):
                gap = x[round((after.start - pause) * 16_000) + 2 : round(after.start * 16_000) - 2]
                assert float(gap.abs().max()) == 0 and after.start >= before.end - 1e-3
                silent += 1
        inside += [rms_db(x[round(w.start * 16_000) : round(w.end * 16_000)]) for w in utterance.words]
    assert silent > 40 and min(inside) > -45


@needs_espeak
def test_the_library_is_never_loaded_here(tmp_path):
    speak([Request("hello")], tmp_path / "x.flac")
    maps = "/proc/self/maps"
    if not os.path.exists(maps):
        pytest.skip("this system does not list loaded libraries")
    with open(maps) as file:
        assert "libespeak" not in file.read()


@needs_espeak
def test_the_same_corpus_in_another_folder_and_another_seed(tmp_path):
    first, second = (make_corpus("tiny", "test", n=3, cache=tmp_path / name) for name in "ab")
    assert [u.words for u in first] == [u.words for u in second]
    assert all(torch.equal(a.waveform(), b.waveform()) for a, b in zip(first, second))
    other = make_corpus("tiny", "test", n=3, seed=1, cache=tmp_path / "a")
    assert [u.text for u in other] != [u.text for u in first] and all(torch.equal(a.waveform(), b.waveform()) for a, b in zip(first, second))
    assert pickle.loads(pickle.dumps(first))[2].waveform().equal(first[2].waveform())  # workers of a data loader get copies


@needs_espeak
@pytest.mark.parametrize("content", ["{", "null", '{"utterances": []}'])
def test_a_damaged_index_is_made_again(tmp_path, content):
    make_corpus("tiny", "dev", n=2, cache=tmp_path)
    index, shard = next(tmp_path.rglob("*.json")), next(tmp_path.rglob("*.flac"))
    right, sound = index.read_text(), sha256_of(shard)
    index.write_text(content)
    assert len(make_corpus("tiny", "dev", n=2, cache=tmp_path)) == 2
    assert index.read_text() == right and sha256_of(shard) == sound


@needs_espeak
def test_a_killed_run_is_finished_by_the_next(tmp_path):
    whole = make_corpus("tiny", "train", cache=tmp_path / "whole")
    code = f"from speechlearn.data.synthetic import make_corpus; make_corpus('tiny', 'train', cache={str(tmp_path / 'killed')!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list((tmp_path / "killed").rglob("*.flac")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    finished = make_corpus("tiny", "train", cache=tmp_path / "killed")
    assert [u.text for u in finished] == [u.text for u in whole]
    assert all(torch.equal(a.waveform(), b.waveform()) for a, b in zip(finished, whole))


def test_load_corpus_by_name(tmp_path):
    assert len(load_corpus("sampler")) == 16 and len(load_corpus("sampler", n=3)) == 3
    name = sampler()[0].speaker
    assert load_corpus("sampler", speakers=[name]).speakers == [name]
    with pytest.raises(ValueError, match="'sampler' has no split 'train'; choose test"):
        load_corpus("sampler", "train")
    with pytest.raises(ValueError, match="n is -1"):
        load_corpus("sampler", n=-1)
    tone = 0.1 * torch.sin(torch.arange(8_000) / 20)
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "1" / "2"
    chapter.mkdir(parents=True)
    for i in range(3):
        save(chapter / f"1-2-{i:04d}.flac", tone, 16_000)
    (chapter / "1-2.trans.txt").write_text("".join(f"1-2-{i:04d} A B\n" for i in range(3)))
    assert [u.id for u in load_corpus("librispeech", "test", root=tmp_path, n=2)] == ["1-2-0000", "1-2-0001"]
    word = tmp_path / "SpeechCommands" / "speech_commands_v0.02" / "stop"
    word.mkdir(parents=True)
    save(word / "f00_nohash_0.wav", tone, 16_000)
    for name, content in (("testing_list.txt", "stop/f00_nohash_0.wav\n"), ("validation_list.txt", "")):
        (word.parent / name).write_text(content)
    assert [u.text for u in load_corpus("speech_commands", "test", root=tmp_path)] == ["stop"]
    (tmp_path / "waves_yesno").mkdir()
    save(tmp_path / "waves_yesno" / "1_0.wav", tone, 8_000)
    assert [u.text for u in load_corpus("yesno", "all", root=tmp_path)] == ["yes no"]
    with pytest.raises(ValueError, match="'yesno' has no split 'train'; choose test, all"):
        load_corpus("yesno", "train", root=tmp_path)


@needs_espeak
@pytest.mark.slow
def test_the_sampler_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHLEARN_CACHE", str(tmp_path / "cache"))
    made, shipped = synthetic.write_sampler(tmp_path / "sampler"), sampler()
    assert [(u.text, u.speaker) for u in made] == [(u.text, u.speaker) for u in shipped]
    for a, b in zip(made[8:], shipped[8:]):  # the commands; digit strings have got pauses since. Other versions of espeak-ng may shift a word a little.
        assert abs(a.seconds - b.seconds) < 0.05 and all(abs(v.start - w.start) < 0.05 for v, w in zip(a.words, b.words))
