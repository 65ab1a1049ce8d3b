"""data.corpora: one form for all corpora, digit strings of people, adapters, downloads."""
import functools
import hashlib
import http.server
import io
import os
import pickle
import statistics
import tarfile
import threading
import zipfile

import pytest
import torch

from speechlearn.data.corpora import (
    Corpus, DigitString, DownloadError, FilePart, Utterance, connected_digits, download, fsdd, fsdd_clips, librispeech, speech_commands, unpack, yesno,
)
from speechlearn.sound.waveform import load, rms_db, save
from speechlearn.text import DIGITS


def noise(seconds, seed, rate):
    return 0.1 * torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the layout of the Free Spoken Digit Dataset: two speakers, all digits, seven takes."""
    root = tmp_path_factory.mktemp("fsdd")
    (root / "recordings").mkdir()
    for speaker, level in (("anna", 1.0), ("bert", 0.1)):
        for digit in range(10):
            for take in (0, 3, 4, 5, 9, 10, 49):
                save(root / "recordings" / f"{digit}_{speaker}_{take}.wav", level * noise(0.2 + 0.01 * digit, 100 * digit + take, 8_000), 8_000)
    (root / "recordings" / "notes.wav").write_text("no clip")
    return root


def test_clips_and_takes(folder):
    clips = fsdd_clips(folder)
    assert len(clips) == 140 and {c.digit for c in clips} == set(range(10))
    assert fsdd_clips(folder / "recordings") == clips
    for split, takes in (("test", {0, 3, 4}), ("dev", {5, 9}), ("train", {10, 49})):
        used = {p for u in fsdd(folder, split, n=80) for p in u.source.paths}
        assert {int(p.rsplit("_", 1)[1][:-4]) for p in used} == takes


def test_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.delenv("SPEECHLEARN_FSDD", raising=False)
    with pytest.raises(ValueError, match="not part of this package.*SPEECHLEARN_FSDD"):
        fsdd()
    monkeypatch.setenv("SPEECHLEARN_FSDD", str(folder))
    assert len(fsdd(n=5)) == 5


def test_wrong_folders_splits_and_speakers(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        fsdd_clips(tmp_path / "none")
    with pytest.raises(ValueError, match="no clips named like"):
        fsdd_clips(tmp_path)
    with pytest.raises(ValueError, match="split is 'validation'"):
        fsdd(folder, "validation")
    with pytest.raises(ValueError, match="no speaker 'carl'; it has anna, bert"):
        fsdd(folder, speakers=["carl"])
    assert fsdd(folder, speakers=["bert"], n=6).speakers == ["bert"]


def test_digit_strings_are_as_described(folder):
    corpus = fsdd(folder, "test", n=200)
    assert len(corpus) == 200 and corpus.speakers == ["anna", "bert"]
    lengths = [len(u.words) for u in corpus]
    assert min(lengths) == 1 and max(lengths) == 7
    for utterance in corpus[:40]:
        speakers = {p.split("_")[-2] for p in utterance.source.paths}
        assert speakers == {utterance.speaker}
        assert utterance.text.split() == [DIGITS[int(os.path.basename(p)[0])] for p in utterance.source.paths]
        pauses = utterance.source.pauses
        assert 0.05 <= pauses[0] <= 0.2 and all(0.02 <= p <= 0.3 for p in pauses[1:-1]) and len(pauses) == len(utterance.words) + 1
        assert -90 <= utterance.source.floor_db <= -60


def test_digit_strings_sound_as_long_and_as_loud_as_they_say(folder):
    for utterance in fsdd(folder, "test", n=12):
        x = utterance.waveform()
        assert abs(len(x) / 16_000 - utterance.seconds) < 0.01 and torch.equal(x, utterance.waveform())
        assert abs(rms_db(x) - utterance.source.level_db) < 0.1
        before = x[: int(0.04 * 16_000)]
        assert rms_db(before) == pytest.approx(utterance.source.floor_db, abs=1.5)  # noise, and never digital zero
        first = utterance.words[0]
        inside = x[int(first.start * 16_000) + 200 : int(first.end * 16_000) - 200]
        assert rms_db(inside) > rms_db(before) + 20


def test_digit_strings_repeat_and_extend(folder):
    clips = fsdd_clips(folder)
    short, long = connected_digits(clips, 5, seed=1), connected_digits(clips, 9, seed=1)
    assert short.utterances == long.utterances[:5]
    assert [u.text for u in connected_digits(clips, 5, seed=2)] != [u.text for u in short]
    with pytest.raises(ValueError, match="n=0"):
        connected_digits(clips, 0, seed=1)


def test_corpus_behaves_like_a_sequence():
    utterances = [Utterance(f"u{i}", "x", "abc"[i % 3], 60.0, FilePart("none.wav")) for i in range(6)]
    corpus = Corpus("c", "test", utterances)
    assert len(corpus) == 6 and corpus.seconds == 360 and corpus.speakers == ["a", "b", "c"] and corpus[1].id == "u1"
    assert isinstance(corpus[:2], Corpus) and len(corpus[:2]) == 2 and len(corpus.where(speakers=["a", "c"])) == 4
    with pytest.raises(ValueError, match="no speaker 'z'; it has a, b, c"):
        corpus.where(speakers=["z"])
    with pytest.raises(ValueError, match="two utterances are called 'u0'"):
        Corpus("c", "test", [*utterances, utterances[0]])


def test_librispeech_layout(tmp_path):
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "61" / "70968"
    chapter.mkdir(parents=True)
    for i in range(2):
        save(chapter / f"61-70968-{i:04d}.flac", noise(0.5 + i, i, 16_000), 16_000)
    (chapter / "61-70968.trans.txt").write_text("61-70968-0000 HE BEGAN\n61-70968-0001 IT'S DONE\n")
    corpus = librispeech(tmp_path, "test-clean")
    assert [(u.text, u.speaker, u.seconds) for u in corpus] == [("he began", "61", 0.5), ("it's done", "61", 1.5)]
    assert len(corpus[1].waveform()) == 24_000
    with pytest.raises(ValueError, match="there is no folder '.*dev-clean'; expected a part of LibriSpeech"):
        librispeech(tmp_path, "dev-clean")


@pytest.mark.parametrize(
    ("lines", "recordings", "message"),
    [
        (["5-6-0000 ONE", "5-6-0001 TWO"], [0], "1 of 2 utterances have a transcript but no recording, for instance '5-6-0001'"),
        (["5-6-0000 ONE"], [0, 1, 2], "2 of 3 utterances have a recording but no transcript, for instance '5-6-0001'"),
        (["5-6-0000 ONE", "5-6-0001 "], [0, 1], r"line 2: '5-6-0001 ' has no words"),
        (["5-6-0000 ONE", "", "5-6-0001 TWO"], [0, 1], "line 2: '' has no words"),
        (["5-6-0000 ONE", "5-6-0001 ROOM 12"], [0, 1], "utterance '5-6-0001': 'ROOM 12' contains '1', '2'"),
    ],
    ids=["lost recording", "lost line", "empty transcript", "empty line", "digits"],
)
def test_librispeech_folder_that_is_not_whole(tmp_path, lines, recordings, message):
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "5" / "6"
    chapter.mkdir(parents=True)
    for i in recordings:
        save(chapter / f"5-6-{i:04d}.flac", noise(0.3, i, 16_000), 16_000)
    (chapter / "5-6.trans.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        librispeech(tmp_path, "test-clean")


def test_speech_commands_without_its_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder '.*speech_commands_v0.02'; expected the unpacked Speech Commands"):
        speech_commands(tmp_path)


def test_speech_commands_layout(tmp_path):
    base = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for word in ("yes", "no"):
        (base / word).mkdir(parents=True)
        for i in range(2):
            save(base / word / f"abc{i}_nohash_0.wav", noise(1.0, i, 16_000), 16_000)
    (base / "validation_list.txt").write_text("")
    (base / "testing_list.txt").write_text("yes/abc0_nohash_0.wav\nno/abc1_nohash_0.wav\n")
    corpus = speech_commands(tmp_path, "testing")
    assert sorted((u.text, u.speaker) for u in corpus) == [("no", "abc1"), ("yes", "abc0")]
    assert len(corpus[0].waveform()) == 16_000


def test_yesno_layout(tmp_path):
    (tmp_path / "waves_yesno").mkdir()
    save(tmp_path / "waves_yesno" / "0_1_1_0.wav", noise(1.0, 0, 8_000), 8_000)
    corpus = yesno(tmp_path)
    assert corpus[0].text == "no yes yes no" and len(corpus[0].waveform(16_000)) == 16_000
    with pytest.raises(ValueError, match="there is no folder"):
        yesno(tmp_path / "none")


@pytest.fixture
def server(tmp_path):
    content = tmp_path / "content"
    content.mkdir()
    (content / "good.bin").write_bytes(b"speech" * 10_000)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/broken.bin":  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "60000")
                self.end_headers()
                self.wfile.write(b"speech" * 100)
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(content))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


GOOD = hashlib.sha256(b"speech" * 10_000).hexdigest()


def test_download_verifies_and_does_not_fetch_twice(server, tmp_path):
    seen = []
    target = download(f"{server}/good.bin", tmp_path / "new" / "good.bin", GOOD, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == b"speech" * 10_000 and seen[-1] == (60_000, 60_000)
    assert download("http://127.0.0.1:9/never", target, GOOD.upper()) == target


@pytest.mark.parametrize("name,sha256,message", [("good.bin", "0" * 64, "has the checksum"), ("broken.bin", GOOD, "broke|could not be fetched|IncompleteRead"), ("none.bin", GOOD, "could not be fetched.*404")])
def test_a_failed_download_leaves_what_was_there(server, tmp_path, name, sha256, message):
    target = tmp_path / "target" / "file.bin"
    target.parent.mkdir()
    target.write_bytes(b"older")
    with pytest.raises(DownloadError, match=message):
        download(f"{server}/{name}", target, sha256)
    assert target.read_bytes() == b"older" and os.listdir(target.parent) == ["file.bin"]


def archive(path, entries, kind):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in entries:
                opened.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as opened:
            for name, content in entries:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                opened.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unpack(tmp_path, kind):
    archive(tmp_path / "a", [("x/one.txt", b"1"), ("two.txt", b"2")], kind)
    out = unpack(tmp_path / "a", tmp_path / "out")
    assert (out / "x" / "one.txt").read_bytes() == b"1" and (out / "two.txt").read_bytes() == b"2"
    with pytest.raises(ValueError, match="exists already"):
        unpack(tmp_path / "a", out)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt"])
def test_nothing_is_written_outside_the_folder(tmp_path, kind, name):
    archive(tmp_path / "a", [("good.txt", b"1"), (name, b"2")], kind)
    with pytest.raises(ValueError, match="outside the folder"):
        unpack(tmp_path / "a", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists() and os.listdir(tmp_path / "deep") == []
    assert not (tmp_path / "evil.txt").exists()


def test_links_and_non_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as opened:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "somewhere"
        opened.addfile(entry)
    with pytest.raises(ValueError, match="a link or a device"):
        unpack(tmp_path / "links.tar", tmp_path / "out")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        unpack(tmp_path / "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_word_is_its_clip(folder):
    """By hand: outside the words only the floor, inside them the clip, resampled and scaled by one factor."""
    utterance = fsdd(folder, "test", n=12)[3]
    x = utterance.waveform()
    place = 0
    scales = []
    for pause, path in zip(utterance.source.pauses, utterance.source.paths):
        place += round(pause * 16_000)
        clip = load(path, 16_000)
        part = x[place : place + len(clip)]
        scale = float(part @ clip / (clip @ clip))
        scales.append(scale)
        assert rms_db(part - scale * clip) == pytest.approx(utterance.source.floor_db, abs=1.0)
        place += len(clip)
    assert len(x) == place + round(utterance.source.pauses[-1] * 16_000)
    assert max(scales) == pytest.approx(min(scales), rel=0.02)


def test_levels_of_speakers_are_evened_out(folder):
    corpus = fsdd(folder, "test", n=120)  # the clips of anna are 20 dB louder than those of bert
    anna, bert = (statistics.mean(rms_db(u.waveform()) for u in corpus.where(speakers=[name])) for name in ("anna", "bert"))
    assert abs(anna - bert) < 2


def test_telephone_band_stays_a_telephone_band(folder):
    x = fsdd(folder, "test", n=3)[2].waveform()
    power = torch.fft.rfft(x).abs().square()
    frequency = torch.fft.rfftfreq(len(x), 1 / 16_000)
    assert 10 * torch.log10(power[frequency < 3_800].mean() / power[frequency > 4_300].mean()) > 25  # resampling invents nothing


def test_too_loud_is_turned_down_and_not_clipped(folder):
    clip = fsdd_clips(folder)[0].path
    loud = DigitString((clip,), (0.05, 0.05), level_db=0.0, floor_db=-90.0, seed=0).read(16_000)
    quiet = DigitString((clip,), (0.05, 0.05), level_db=-40.0, floor_db=-90.0, seed=0).read(16_000)
    assert float(loud.abs().max()) == 1.0
    assert torch.nn.functional.cosine_similarity(loud, quiet, dim=0) > 0.999


def test_a_corpus_can_be_sent_to_workers(folder):
    corpus = fsdd(folder, "dev", n=4)
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.utterances == corpus.utterances and torch.equal(copy[3].waveform(), corpus[3].waveform())


def test_a_part_of_a_file(tmp_path):
    ramp = torch.arange(16_000) / 16_000
    save(tmp_path / "ramp.wav", ramp, 16_000)
    part = Utterance("p", "x", "s", 0.25, FilePart(str(tmp_path / "ramp.wav"), start=0.5, seconds=0.25)).waveform()
    assert torch.allclose(part, ramp[8_000:12_000], atol=1e-4)


def test_a_wrong_older_file_is_replaced(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"older")
    download(f"{server}/good.bin", target, GOOD)
    assert target.read_bytes() == b"speech" * 10_000 and os.listdir(tmp_path / ".").count("file.bin") == 1


def test_a_stopped_download_leaves_nothing(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f"{server}/good.bin", tmp_path / "new" / "file.bin", GOOD, progress=stop)
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_leave_nothing(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        good = tarfile.TarInfo("good")
        good.size = 1
        opened.addfile(good, io.BytesIO(b"1"))
        entry = tarfile.TarInfo("odd")
        entry.type, entry.linkname = kind, "/etc/hostname"
        opened.addfile(entry)
    with pytest.raises(ValueError, match="'odd', which is a link or a device"):
        unpack(tmp_path / "a.tar", tmp_path / "deep" / "out")
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_damaged_archive_leaves_nothing(tmp_path, kind):
    content = torch.randint(256, (60_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes()
    archive(tmp_path / "a", [("x", content)], kind)
    data = bytearray((tmp_path / "a").read_bytes())
    if kind == "zip":
        data[5_000] ^= 255
    else:
        data = data[:30_000]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises((ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError)):
        unpack(tmp_path / "a", tmp_path / "deep" / "out")
    assert os.listdir(tmp_path / "deep") == []


def test_librispeech_upper_case_and_bad_subset(tmp_path):
    with pytest.raises(ValueError, match="Invalid url 'nosuch'"):
        librispeech(tmp_path, "nosuch")
    chapter = tmp_path / "LibriSpeech" / "dev-other" / "7" / "8"
    chapter.mkdir(parents=True)
    save(chapter / "7-8-0000.flac", noise(0.3, 0, 16_000), 16_000)
    (chapter / "7-8.trans.txt").write_text("7-8-0000 CHAPTER 12\n")
    with pytest.raises(ValueError, match="'1', '2'"):
        librispeech(tmp_path, "dev-other")
