"""The command line: what it prints where, and how it ends."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speechlearn
import speechlearn.training
from speechlearn.checkpoint import load_checkpoint
from speechlearn.cli import main
from speechlearn.recipes import Recipe, make_model, read_settings
from speechlearn.data.synthetic import sampler
from speechlearn.sound.waveform import load, save
from speechlearn.text import DIGITS

RATE = 16_000
PACKAGE = Path(speechlearn.__file__).parent
PROGRAM = Path(sys.executable).parent / "speechlearn"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("SPEECHLEARN_FSDD", raising=False)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def spoken():
    return sampler()[:8]


@pytest.fixture(scope="module")
def wav(tmp_path_factory, spoken):
    path = tmp_path_factory.mktemp("sound") / "said.wav"
    save(path, spoken[1].waveform(), RATE)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory, spoken):
    """A folder like the Free Spoken Digit Dataset, cut from the sampler."""
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    made = set()
    for utterance in spoken:
        waveform = utterance.waveform()
        for word in utterance.words:
            if word.text not in made:
                made.add(word.text)
                sound = waveform[round(word.start * RATE) : round(word.end * RATE)]
                for speaker, takes in (("ann", (0, 5, 10)), ("bob", (1, 11))):  # bob has no take for dev
                    for take in takes:
                        save(folder / "recordings" / f"{DIGITS.index(word.text)}_{speaker}_{take}.wav", sound, RATE)
    assert len(made) >= 9
    return folder


# -- help and usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, names",
    [
        ([], ["transcribe", "evaluate", "train", "corpus"]),
        (["transcribe"], ["FILE", "--checkpoint", "--times", "--json"]),
        (["evaluate"], ["--checkpoint", "--corpus", "--root", "--speakers", "--split", "--utterances", "--json"]),
        (["train"], ["--directory", "--config", "--resume", "--no-augment", "--learning-rate", "highest learning rate"]),
        (["corpus"], ["make", "show", "--save"]),
    ],
)
def test_each_command_explains_itself(run, command, names):
    code, out, err = run(*command, "--help")
    assert code == 0 and err == ""
    assert all(name in out for name in names)


def test_version(run):
    assert run("--version") == (0, f"speechlearn {speechlearn.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [[], ["listen"], ["transcribe"], ["train"], ["evaluate", "--utterances", "many"], ["train", "--directory", "x", "--stepz", "3"], ["corpus", "break", "digits"]]
)
def test_misuse_ends_with_2_and_prints_no_result(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "usage: speechlearn" in err


def test_the_installed_program_reads_digits(wav, spoken, tmp_path):
    if not PROGRAM.exists():
        pytest.skip(f"the package is not installed with its program {PROGRAM}")
    done = subprocess.run([PROGRAM, "transcribe", wav], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, spoken[1].text + "\n", "")
    done = subprocess.run([PROGRAM, "transcribe", tmp_path / "none.wav"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("speechlearn: ") and "Traceback" not in done.stderr


# -- transcribe ---------------------------------------------------------------------------------------------


def test_times_and_json(run, wav, spoken):
    words = spoken[1].text.split()
    code, out, err = run("transcribe", "--times", wav)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and err == "" and [line[2] for line in lines] == words
    numbers = [float(n) for line in lines for n in line[:2]]
    assert numbers == sorted(numbers) and 0 <= numbers[0] and numbers[-1] <= spoken[1].seconds + 0.05
    code, out, err = run("transcribe", "--json", wav, wav)
    assert code == 0 and err == "" and len(out.splitlines()) == 2
    for line in out.splitlines():
        said = json.loads(line)
        assert (said["file"], said["text"]) == (str(wav), spoken[1].text)
        assert [(w["text"], w["start"]) for w in said["words"]] == [(t, pytest.approx(float(n[0]), abs=0.006)) for t, n in zip(words, lines)]


def test_bad_files_among_good_ones(run, wav, spoken, tmp_path):
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(wav.read_bytes()[:-1000])
    (tmp_path / "text.wav").write_text("hello")
    second = tmp_path / "second.wav"
    save(second, spoken[3].waveform(), RATE)
    code, out, err = run("transcribe", wav, damaged, tmp_path / "none.wav", tmp_path / "text.wav", second)
    assert code == 1
    assert out.splitlines() == [f"{wav}: {spoken[1].text}", f"{second}: {spoken[3].text}"]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("speechlearn: ") for line in lines)
    assert "truncated" in lines[0] and "there is no file" in lines[1] and "no sound file" in lines[2]


def test_silence_is_an_empty_line(run, tmp_path):
    save(tmp_path / "silence.wav", torch.zeros(RATE), RATE)
    assert run("transcribe", tmp_path / "silence.wav") == (0, "\n", "")


@pytest.mark.parametrize("command", [["transcribe", "WAV"], ["evaluate", "--corpus", "sampler"]])
def test_missing_and_damaged_checkpoints(run, wav, tmp_path, command):
    command = [str(wav) if part == "WAV" else part for part in command]
    code, out, err = run(*command, "--checkpoint", "digit")
    assert code == 1 and out == "" and "Did you mean 'digits'" in err
    folder = tmp_path / "damaged"
    shutil.copytree(PACKAGE / "checkpoints" / "digits", folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, out, err = run(*command, "--checkpoint", folder)
    assert code == 1 and out == "" and weights.name in err and len(err.splitlines()) == 1


# -- evaluate -----------------------------------------------------------------------------------------------


def test_json_of_evaluate(run, spoken):
    code, out, err = run("evaluate", "--corpus", "sampler", "--utterances", "8", "--json")
    assert code == 0 and err == "" and len(out.splitlines()) == 1
    result = json.loads(out)
    assert {"wer", "cer", "utterances", "words", "seconds_audio", "seconds_compute"} <= set(result)
    assert (result["utterances"], result["words"]) == (8, sum(len(u.words) for u in spoken))
    assert result["wer"] < 0.06 and result["cer"] < 0.06
    assert result["seconds_audio"] == pytest.approx(spoken.seconds, abs=0.1) and result["seconds_compute"] > 0
    code, out, err = run("evaluate", "--corpus", "sampler", "--utterances", "8")
    assert code == 0 and err == "" and f"{100 * result['wer']:.2f} %" in out and "8 utterances" in out


def test_fsdd_from_a_folder(run, clips, monkeypatch):
    code, out, err = run("evaluate", "--corpus", "fsdd", "--root", clips, "--speakers", "ann", "--utterances", "12", "--json")
    assert code == 0 and err == ""
    result = json.loads(out)
    assert (result["corpus"], result["split"], result["utterances"]) == ("fsdd", "test", 12) and result["wer"] < 0.5
    monkeypatch.setenv("SPEECHLEARN_FSDD", str(clips))
    code, again, _ = run("evaluate", "--corpus", "fsdd", "--speakers", "ann", "--utterances", "12", "--json")
    assert code == 0 and {**json.loads(again), "seconds_compute": 0} == {**result, "seconds_compute": 0}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--corpus", "digit"], "no corpus 'digit'; choose .*digits"),
        (["--corpus", "fsdd"], "SPEECHLEARN_FSDD"),
        (["--corpus", "fsdd", "--root", "nowhere"], "no folder 'nowhere'"),
        (["--corpus", "fsdd", "--root", "CLIPS", "--speakers", "zoe"], "no speaker 'zoe'; it has ann, bob"),
        (["--corpus", "fsdd", "--root", "CLIPS", "--split", "tset"], "'tset'; FSDD has test, dev, train"),
        (["--corpus", "fsdd", "--root", "CLIPS", "--speakers", "bob", "--split", "dev"], "no takes.*'dev' of bob"),
        (["--corpus", "fsdd", "--root", "CLIPS", "--utterances", "0"], "at least 1"),
        (["--corpus", "digits", "--split", "tset"], "no split 'tset'"),
        (["--corpus", "yesno"], "--root"),
        (["--corpus", "sampler", "--speakers", "nobody"], "no speaker 'nobody'"),
        (["--corpus", "sampler", "--utterances", "0"], "no utterances"),
        (["--corpus", "sampler", "--utterances", "-1"], "-1"),
        (["--corpus", "sampler", "--split", "tset"], "tset"),
    ],
)
def test_wrong_corpora_end_with_1(run, clips, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("evaluate", *[clips if a == "CLIPS" else a for a in arguments])
    assert code == 1 and out == "" and err.startswith("speechlearn: ") and re.search(says, err)


# -- corpus -------------------------------------------------------------------------------------------------


def test_show_and_save_a_corpus(run, spoken, tmp_path):
    code, out, err = run("corpus", "show", "sampler", "--utterances", "3", "--save", tmp_path / "new" / "folder")
    assert code == 0 and err == "" and out.startswith("sampler test: 3 utterances, 3 speakers")
    assert all(u.text in out for u in spoken[:3]) and spoken[3].speaker not in out
    saved = tmp_path / "new" / "folder"
    assert len(list(saved.iterdir())) == 6
    assert (saved / "digits-2.txt").read_text() == spoken[2].text + "\n"
    assert (load(saved / "digits-2.wav", RATE) - spoken[2].waveform()).abs().max() < 1e-4


# -- settings -----------------------------------------------------------------------------------------------


def test_settings_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 7\naugment: false\nlearning_rate: 1\ncorpus: fsdd\n")
    assert read_settings(tmp_path / "a.yaml") == {"steps": 7, "augment": False, "learning_rate": 1, "corpus": "fsdd"}
    (tmp_path / "a.json").write_text(json.dumps({"steps": 7, "telephone": 0.25}))
    assert read_settings(str(tmp_path / "a.json")) == {"steps": 7, "telephone": 0.25}


@pytest.mark.parametrize(
    "text, says",
    [
        ("step: 7", "'step'.*Did you mean 'steps'"),
        ("zzzzzz: 7", "no setting.*Known: model, corpus"),
        ("steps: many", "steps is 'many'; expected int"),
        ("steps: 7.5", "expected int"),
        ("steps: true", "expected int"),
        ("augment: 1", "expected bool"),
        ("corpus: 3", "expected str"),
        ("steps: [", "neither YAML nor JSON"),
        ("- steps", "lines like 'steps: 500'"),
        ("steps: 7\nseed: 1\nsteps: 8", "gives 'steps' more than once"),
        ('{"steps": 7, "steps": 8}', "gives 'steps' more than once"),
        ("threads: -1", "threads is -1; it must not be negative"),
        ("workers: -1", "workers is -1; it must not be negative"),
        ("seed: -1", "seed is -1; it must not be negative"),
        ("fast_emit: .nan", "fast_emit is nan; it must not be negative"),
        ("", "lines like 'steps: 500'"),
        ("steps: 0", "steps is 0; it must be at least 1"),
        ("vocabulary: phones", "words, letters or subwords"),
        ("fastest: 3.0", "expected 1 to 2"),
        ("average: 1.0", "between 0 and 1"),
    ],
)
def test_wrong_settings_end_with_1(run, tmp_path, monkeypatch, text, says):
    monkeypatch.setattr("speechlearn.cli.run_training", lambda *a, **k: pytest.fail("training began"))
    (tmp_path / "a.yaml").write_text(text)
    code, out, err = run("train", "--directory", tmp_path / "run", "--config", tmp_path / "a.yaml")
    assert code == 1 and out == "" and re.search(says, err) and not (tmp_path / "run").exists()


def test_a_settings_file_that_cannot_be_read_is_named(run, tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        code, out, err = run("train", "--directory", tmp_path / "run", "--config", path)
        assert code == 1 and out == "" and str(path) in err


def test_true_is_no_number(tmp_path):
    (tmp_path / "a.yaml").write_text("telephone: true")
    with pytest.raises(ValueError, match="expected float"):
        read_settings(tmp_path / "a.yaml")


def test_whole_numbers_become_floats(tmp_path):
    (tmp_path / "a.yaml").write_text("telephone: 1")
    assert type(read_settings(tmp_path / "a.yaml")["telephone"]) is float


def test_a_settings_file_that_is_no_text_is_named(run, tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00steps")
    code, _, err = run("train", "--directory", tmp_path / "run", "--config", tmp_path / "a.yaml")
    assert code == 1 and "a.yaml" in err


def test_small_numbers_of_json_are_numbers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 1e-05}))
    assert read_settings(tmp_path / "a.json") == {"learning_rate": 1e-05}


def test_models_follow_from_the_recipe():
    (a, words), (b, _), (c, letters) = make_model(Recipe(d_model=16)), make_model(Recipe(d_model=16)), make_model(Recipe(d_model=16, seed=1, vocabulary="letters"))
    assert (len(words), len(letters)) == (a.config.vocab, c.config.vocab) == (15, 33)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.front[0].weight, c.front[0].weight)


# -- train --------------------------------------------------------------------------------------------------


def test_train_stop_resume_and_use(run, clips, wav, tmp_path, monkeypatch):
    settings = {"corpus": "fsdd", "root": str(clips), "speakers": "ann", "utterances": 6, "d_model": 16, "n_layers": 1, "steps": 99, "validate_every": 2, "telephone": 0.3}
    (tmp_path / "a.yaml").write_text(json.dumps(settings))
    command = ["train", "--config", tmp_path / "a.yaml", "--steps", "4", "--max-frames", "1000"]

    code, out, err = run(*command, "--directory", tmp_path / "whole")
    assert code == 0 and f"--checkpoint {tmp_path / 'whole' / 'recogniser'}" in out
    loaded = load_checkpoint(tmp_path / "whole" / "recogniser")
    recipe = loaded.metadata["recipe"]
    assert loaded.metadata["steps"] == recipe["steps"] == 4  # the command line beats the file
    assert (recipe["utterances"], recipe["telephone"], recipe["d_model"]) == (6, 0.3, 16) and loaded.model.config.d_model == 16
    untrained = make_model(Recipe(d_model=16, n_layers=1))[0].state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in loaded.model.state_dict().items())
    assert run("transcribe", "--checkpoint", tmp_path / "whole" / "recogniser", wav)[0] == 0

    code, out, err = run(*command, "--directory", tmp_path / "whole")
    assert code == 1 and out == "" and "resume" in err  # nothing is overwritten

    keep = speechlearn.training.save_run

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(speechlearn.training, "save_run", interrupted)
        code, out, err = run(*command, "--directory", tmp_path / "parts", "--resume")
    assert code == 130 and out == "" and "stopped" in err and not (tmp_path / "parts" / "recogniser").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    others = {"--no-augment": "augment was True and is False", "--top-hz=4000": "top_hz was 8000.0 and is 4000.0", "--masks=2": "masks was 0 and is 2"}
    for option, says in others.items():  # the loop sees none of these
        code, out, err = run(*command, "--directory", tmp_path / "parts", "--resume", option)
        assert code == 1 and out == "" and says in err and "Use another directory" in err
    assert {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before
    steps_done = []
    step = speechlearn.training.take_step
    monkeypatch.setattr(speechlearn.training, "take_step", lambda run: (steps_done.append(1), step(run))[1])
    code, out, err = run(*command, "--directory", tmp_path / "parts", "--resume", "--threads", "1")  # which changes nothing
    assert code == 0 and len(steps_done) == 2  # of four: the first two were not done again
    again = load_checkpoint(tmp_path / "parts" / "recogniser").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in loaded.model.state_dict().items())


def test_a_run_without_its_recipe_goes_on(run, clips, tmp_path, monkeypatch):  # made before recipes were kept
    (tmp_path / "a.yaml").write_text(json.dumps({"corpus": "fsdd", "root": str(clips), "utterances": 6, "d_model": 16, "n_layers": 1, "steps": 2, "validate_every": 2, "max_frames": 1000}))
    command = ["train", "--config", tmp_path / "a.yaml", "--directory", tmp_path / "run"]
    assert run(*command)[0] == 0
    (tmp_path / "run" / "recipe.json").unlink()
    assert run(*command, "--resume")[0] == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["utterances"] == 6
    (tmp_path / "run" / "recipe.json").write_text("{")
    code, out, err = run(*command, "--resume")
    assert code == 1 and out == "" and "recipe.json is not JSON" in err


@pytest.mark.parametrize("vocabulary", ["letters", "words"])
def test_a_speech_transformer_is_trained_stopped_and_resumed_to_the_same_weights(run, clips, wav, tmp_path, monkeypatch, vocabulary):
    settings = {
        "model": "speech-transformer", "corpus": "fsdd:6", "root": str(clips), "speakers": "ann", "vocabulary": vocabulary, "d_model": 16, "n_layers": 1, "n_decoder_layers": 1,
        "n_bins": 40, "top_hz": 3800.0, "masks": 1, "warp": 0.2, "hard_cut": 1.0, "steps": 4, "validate_every": 2, "max_frames": 1000,
    }
    (tmp_path / "a.json").write_text(json.dumps(settings))
    command = ["train", "--config", tmp_path / "a.json"]
    assert run(*command, "--directory", tmp_path / "whole")[0] == 0
    keep = speechlearn.training.save_run

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(speechlearn.training, "save_run", interrupted)
        assert run(*command, "--directory", tmp_path / "parts", "--resume")[0] == 130
    assert run(*command, "--directory", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (load_checkpoint(tmp_path / name / "recogniser") for name in ("whole", "parts"))
    assert type(whole.model).__name__ == "SpeechTransformer" and whole.features["n_bins"] == 40 and whole.features["f_max"] == 3800.0
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()))
    code, out, err = run("transcribe", "--checkpoint", tmp_path / "whole" / "recogniser", wav)
    assert code == 0, err


def test_numbers_of_utterances_in_the_corpus(run, clips, tmp_path):
    from speechlearn.recipes import load_mixture

    recipe = Recipe(corpus="fsdd:3", root=str(clips), speakers="ann", utterances=7)
    assert [len(load_mixture(recipe, split, 2)) for split in ("train", "dev")] == [3, 2]
    code, out, err = run("train", "--directory", tmp_path / "run", "--corpus", "fsdd:many", "--root", clips)
    assert code == 1 and "corpus 'fsdd:many': after the colon stands the number of utterances, as in fsdd:2000" in err


def test_subwords_are_learned_from_the_training_texts():
    pytest.importorskip("espeakng_loader")
    model, vocabulary = make_model(Recipe(model="speech-transformer", corpus="tiny", utterances=64, vocabulary="subwords", n_subwords=60, d_model=16, n_layers=1))
    assert vocabulary.kind == "subwords" and model.config.vocab == len(vocabulary)
    text = "turn on the kitchen light"
    assert vocabulary.decode(vocabulary.encode(text)) == text and len(vocabulary.encode(text)) < len(text)


def test_train_says_what_is_wrong_with_the_corpus(run, tmp_path):
    code, out, err = run("train", "--directory", tmp_path / "run", "--corpus", "digitz")
    assert code == 1 and out == "" and "no corpus 'digitz'" in err
    code, out, err = run("train", "--directory", tmp_path / "run", "--corpus", "fsdd", "--root", tmp_path)
    assert code == 1 and out == "" and "no clips" in err
