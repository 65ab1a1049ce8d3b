"""The recogniser of part 4: settings, parts of its loss, what it learns by heart, checkpoints, stops, and the command line."""
import copy
import dataclasses
import json
import shutil

import pytest
import torch

import speechlearn.alignment.recogniser
import speechlearn.training
from speechlearn.alignment.ctc import ctc_loss
from speechlearn.alignment.pruned import pruned_transducer_losses
from speechlearn.alignment.recogniser import AlignmentRecogniser, AlignmentRecogniserConfig
from speechlearn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from speechlearn.cli import main
from speechlearn.data.batches import Batch, assert_batch_independent
from speechlearn.data.synthetic import sampler
from speechlearn.recipes import Recipe, begin_with, make_model
from speechlearn.sound.waveform import save
from speechlearn.text import DIGITS, CharacterVocabulary
from speechlearn.training import TrainConfig, train

RATE = 16_000
VOCABULARY = CharacterVocabulary(" abc")
TEXTS = ["ab ca", "b"]  # no pair of symbols twice: the predictor could not tell them apart
HEADS = ["ctc", "transducer", "both"]


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


def tiny(head="both", **settings):
    torch.manual_seed(0)
    sizes = {"vocab": len(VOCABULARY), "n_bins": 8, "d_model": 32, "n_heads": 2, "n_layers": 1, "d_feedforward": 64, "decoder_dim": 16, "joiner_dim": 32, "warm_steps": 30, "dropout": 0.0, "local_kernel": 5}
    return AlignmentRecogniser(AlignmentRecogniserConfig(**sizes | {"head": head} | settings))


def batch_of(texts=TEXTS, n_frames=(60, 41), seed=1):
    targets, target_lengths = VOCABULARY.encode_batch(texts)
    features = torch.randn(len(texts), max(n_frames), 8, generator=torch.Generator().manual_seed(seed))
    return Batch(features, tensor(n_frames), targets, target_lengths, list(texts), [f"u{i}" for i in range(len(texts))])


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "rnnt"}, "head is 'rnnt'; choose ctc, transducer or both"),
        ({"decoder_dim": 0}, "decoder_dim is 0; it must be at least 1"),
        ({"joiner_dim": -1}, "joiner_dim is -1"),
        ({"context_size": 0}, "context_size is 0"),
        ({"warm_steps": 0}, "warm_steps is 0"),
        ({"n_rows": 1}, r"n_rows is 1 \(expected at least 2\)"),
        ({"blank": 9}, r"blank 9 \(expected one of the 9 symbols\)"),
        ({"blank": -1}, "blank -1"),
        ({"fast_emit": -0.1}, r"fast_emit \(-0.1\) and ctc_weight \(0.2\) must not be negative"),
        ({"ctc_weight": -1.0}, r"ctc_weight \(-1.0\)"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"local_kernel": 4}, "local_kernel is 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_layers": 0}, "n_encoder_layers is 0"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignmentRecogniserConfig(**{"vocab": 9} | settings)


def test_settings_cannot_be_changed_and_reach_every_part():
    config = AlignmentRecogniserConfig(vocab=9, head="both", context_size=3, decoder_dim=24, joiner_dim=20, d_model=16, n_layers=2, blank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head = "ctc"
    model = AlignmentRecogniser.from_config(config)
    assert (model.decoder.blank_id, model.decoder.context_size, model.decoder.embedding.embedding_dim) == (4, 3, 24)
    assert model.joiner.output_linear.in_features == 20 and len(model.encoder.stack.blocks) == 2
    parts = {head: {name.split(".")[0] for name in tiny(head).state_dict()} for head in HEADS}
    transducer = {"decoder", "joiner", "simple_am_proj", "simple_lm_proj", "trained_steps"}
    assert parts == {"ctc": {"encoder", "ctc_output"}, "transducer": {"encoder"} | transducer, "both": {"encoder", "ctc_output"} | transducer}


# ---- the loss -------------------------------------------------------------------------------------------------------


def parts_by_hand(model, batch, n_rows=5):
    """CTC, simple and pruned loss for each symbol, utterance by utterance."""
    found = []
    for i, (frames, symbols) in enumerate(zip(batch.feature_lengths, batch.target_lengths)):
        sound, steps = model(batch.features[i : i + 1, :frames], frames[None])
        text = batch.targets[i : i + 1, :symbols]
        ctc = ctc_loss(model.ctc_log_probs(sound), text, steps, symbols[None], blank=0)
        names = ("decoder", "joiner", "simple_am_proj", "simple_lm_proj")
        both = pruned_transducer_losses(sound, text, steps, symbols[None], **{name: getattr(model, name) for name in names}, blank=0, n_rows=n_rows)
        found.append(torch.stack([x[0] / symbols for x in (ctc, *both)]))
    return torch.stack(found).mean(dim=0)


@pytest.mark.parametrize(("trained", "weights"), [(0, (1.0, 0.1)), (15, (0.75, 0.55)), (30, (0.5, 1.0)), (999, (0.5, 1.0))])
def test_loss_is_the_weighted_sum_of_its_parts(trained, weights):
    model, batch = tiny("both", ctc_weight=0.3), batch_of()
    model.trained_steps.fill_(trained)
    ctc, simple, pruned = parts_by_hand(model.train(), batch)
    found = model.loss(batch)
    assert set(found) == {"loss", "ctc", "too_short", "simple", "pruned"} and found["too_short"] == 0
    for name, expected in (("ctc", ctc), ("simple", simple), ("pruned", pruned), ("loss", 0.3 * ctc + weights[0] * simple + weights[1] * pruned)):
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-4), name
    assert int(model.trained_steps) == trained + 1
    assert found["loss"].requires_grad and not any(found[name].requires_grad for name in ("ctc", "simple", "pruned"))
    model.eval()
    assert model.loss(batch)["loss"].item() == pytest.approx((0.3 * ctc + 0.5 * simple + pruned).item(), rel=1e-4)  # always the final weights
    assert int(model.trained_steps) == trained + 1  # validation does not count


def test_each_head_has_its_parts():
    assert set(tiny("ctc").loss(batch_of())) == {"loss", "ctc", "too_short"}
    assert set(tiny("transducer").loss(batch_of())) == {"loss", "simple", "pruned"}
    model, batch = tiny("ctc"), batch_of()
    assert torch.equal(model.loss(batch)["loss"].detach(), model.loss(batch)["ctc"])


def test_what_ctc_cannot_align_is_left_out_and_counted():
    """The transducer needs no step for each symbol, so it keeps the utterance."""
    batch = batch_of(["ab cab", "b", "cc"], (16, 41, 8))  # 4 steps for 6 symbols; 2 steps for a repeated one
    model = tiny("both")
    found = model.loss(batch)
    assert found["too_short"].item() == pytest.approx(2 / 3)
    alone = Batch(batch.features[1:2, :41], tensor([41]), batch.targets[1:2, :1], tensor([1]), ["b"], ["u1"])
    assert found["ctc"].item() == pytest.approx(model.loss(alone)["ctc"].item(), rel=1e-4)
    assert found["pruned"].isfinite() and found["simple"].isfinite()
    found["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_that_ctc_cannot_align_at_all_is_refused(head):
    """As by the first recogniser: a loss of 0 would look like a perfect one. A transducer alone has nothing to refuse."""
    model, batch = tiny(head), batch_of(["ab cab", "abcabc"], (16, 12))
    if head == "transducer":
        assert model.loss(batch)["loss"].isfinite()
        return
    with pytest.raises(ValueError, match=r"no utterance of the batch \(u0, u1, …\) has as many steps of 40 ms as CTC needs for its text; use larger symbols, slower speech"):
        model.loss(batch)
    if head == "both":
        assert int(model.trained_steps) == 0


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns(head):
    model = tiny(head)
    model.loss(batch_of())["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_fast_emit_works_in_training_only():
    gradients = {}
    for fast_emit, training in ((0.0, True), (0.5, True), (0.0, False), (0.5, False)):
        model = tiny("transducer", fast_emit=fast_emit).train(training)
        found = model.loss(batch_of())
        found["loss"].backward()
        gradients[fast_emit, training] = (found["loss"].item(), model.joiner.output_linear.weight.grad)
    assert gradients[0.0, True][0] == gradients[0.5, True][0] and not torch.allclose(gradients[0.0, True][1], gradients[0.5, True][1])
    assert torch.equal(gradients[0.0, False][1], gradients[0.5, False][1])


# ---- learning by heart, and reading ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """Both heads, with one batch learned by heart."""
    model, batch = tiny("both", ctc_weight=1.0), batch_of()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        model.loss(batch)["loss"].backward()
        optimiser.step()
    return model.eval(), batch


@pytest.mark.parametrize(("way", "beam"), [("ctc", 1), ("ctc", 4), ("transducer", 1), ("transducer", 4), (None, 4)])
def test_what_was_learned_is_read_with_times(learned, way, beam):
    model, batch = learned
    found = model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=beam, way=way)
    assert [" ".join(word for word, _, _ in words) for words in found] == TEXTS
    steps = [15, 11]
    for words, n in zip(found, steps):
        edges = [edge for _, first, last in words for edge in (first, last)]
        assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] < n
    for i, n in enumerate(batch.feature_lengths.tolist()):
        assert model.recognise(batch.features[i : i + 1, :n], tensor([n]), VOCABULARY, beam=beam, way=way)[0] == found[i]


def test_the_transducer_is_the_default_of_both_heads(learned, monkeypatch):
    model, batch = learned
    monkeypatch.setattr(model, "ctc_log_probs", None)
    assert [len(words) for words in model.recognise(batch.features, batch.feature_lengths, VOCABULARY)] == [2, 1]


def test_special_symbols_are_never_found():
    """Also by a model that would like nothing better."""
    batch, specials = batch_of(), range(1, len(VOCABULARY) - len(VOCABULARY.symbols))
    model = tiny("both").eval()
    with torch.no_grad():
        for layer in (model.ctc_output, model.joiner.output_linear):
            layer.bias[list(specials)] += 20
    for way in ("ctc", "transducer"):
        for words in model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=3, way=way):
            assert all(set(word) <= set("abc") for word, _, _ in words), way


def test_on_the_best_path_of_ctc_special_symbols_hide_no_letters(learned):
    """A model that has come to like special symbols best is read as before: the best of the others is still the same."""
    model, batch = copy.deepcopy(learned[0]), learned[1]
    with torch.no_grad():
        model.ctc_output.bias[1 : len(VOCABULARY) - len(VOCABULARY.symbols)] += 20
    found = model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=1, way="ctc")
    assert [" ".join(word for word, _, _ in words) for words in found] == TEXTS


@pytest.mark.parametrize("way", ["ctc", "transducer"])
def test_an_utterance_is_read_alone_as_in_a_batch(way):
    """By a model that writes at nearly every step, also at those of the padding if it were asked there."""
    model, batch = tiny("both").eval(), batch_of(["a"] * 3, (60, 41, 9))
    with torch.no_grad():
        for layer in (model.ctc_output, model.joiner.output_linear):
            layer.weight.mul_(8)
            layer.bias[0] -= 3
        for layer in (model.joiner.encoder_proj, model.joiner.decoder_proj):
            layer.weight.mul_(4)
    assert_batch_independent(model, batch.features, batch.feature_lengths)
    together = model.recognise(batch.features, batch.feature_lengths, VOCABULARY, way=way)
    for i, n in enumerate(batch.feature_lengths.tolist()):
        assert model.recognise(batch.features[i : i + 1, :n], tensor([n]), VOCABULARY, way=way) == [together[i]]
    assert together[0] and together[1]


def test_the_limit_of_symbols_at_one_step_reaches_the_search(learned, monkeypatch):
    """Three, unless one asks for another limit: the stored error rates were measured so."""
    model, batch = learned
    searches, made = [], speechlearn.alignment.recogniser.TransducerSearch

    def remember(*args, **options):
        searches.append(made(*args, **options))
        return searches[-1]

    monkeypatch.setattr(speechlearn.alignment.recogniser, "TransducerSearch", remember)
    for options in ({}, {"max_symbols": 1}, {"max_symbols": 4}):
        model.recognise(batch.features, batch.feature_lengths, VOCABULARY, way="transducer", **options)
    assert [search.max_symbols for search in searches] == [3, 1, 4]


def test_wrong_ways():
    features, lengths = batch_of().features, batch_of().feature_lengths
    with pytest.raises(ValueError, match="way is 'transducer', but the head of this model is 'ctc'"):
        tiny("ctc").eval().recognise(features, lengths, VOCABULARY, way="transducer")
    with pytest.raises(ValueError, match="this model has no CTC head; its head is a transducer"):
        tiny("transducer").eval().recognise(features, lengths, VOCABULARY, way="ctc")
    with pytest.raises(ValueError, match="way is 'beam', but the head of this model is 'both'"):
        tiny("both").eval().recognise(features, lengths, VOCABULARY, way="beam")
    with pytest.raises(ValueError, match="80 bins; this model was made for 8"):
        tiny("both")(torch.zeros(1, 20, 80), tensor([20]))


# ---- checkpoints and stops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_keeps_weights_settings_and_steps(tmp_path, head):
    model, batch = tiny(head, fast_emit=0.01, n_rows=4), batch_of()
    for _ in range(7):
        model.loss(batch)
    save_checkpoint(tmp_path / "m", model, vocabulary=VOCABULARY, features={}, metadata={})
    again = load_checkpoint(tmp_path / "m").model
    assert again.config == model.config and type(again) is AlignmentRecogniser
    assert {name: (x.dtype, x.tolist()) for name, x in again.state_dict().items()} == {name: (x.dtype, x.tolist()) for name, x in model.state_dict().items()}
    assert head == "ctc" or int(again.trained_steps) == 7
    assert model.eval().recognise(batch.features, batch.feature_lengths, VOCABULARY) == again.eval().recognise(batch.features, batch.feature_lengths, VOCABULARY)


def test_a_stopped_training_goes_on_with_the_same_losses(tmp_path, monkeypatch):
    """The weights of the two losses follow the number of steps, so it must survive the stop."""
    batches = [batch_of(seed=seed) for seed in range(3)]
    config = TrainConfig(n_steps=8, learning_rate=1e-3, warmup_steps=2, validate_every=4, log_every=1, average=0.9)
    settings = {"warm_steps": 6, "dropout": 0.1}

    def go(name, **options):
        model = tiny("both", **settings)
        result = train(model, batches, batches[:1], config=config, directory=tmp_path / name, show="none", **options)
        return model, result

    whole, expected = go("whole")
    keep = speechlearn.training.save_run

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(speechlearn.training, "save_run", interrupted)
        go("parts")
    parts, found = go("parts", resume=True)
    assert found.losses == expected.losses and len(found.losses) == 8
    assert int(parts.trained_steps) == int(whole.trained_steps) == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))


def test_begin_with_takes_what_fits_and_refuses_what_is_no_start(tmp_path):
    vocabulary = VOCABULARY
    for name, settings in (("ctc", {}), ("wide", {"d_model": 64}), ("deep", {"n_layers": 2})):
        save_checkpoint(tmp_path / name, tiny("ctc", **settings), vocabulary=vocabulary, features={}, metadata={})
    torch.manual_seed(9)
    fresh = tiny("transducer")
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    before = {name: p.clone() for name, p in fresh.state_dict().items()}
    assert begin_with(fresh, str(tmp_path / "ctc")) == sum(p.numel() for p in fresh.encoder.parameters())
    source = load_checkpoint(tmp_path / "ctc").model.state_dict()
    for name, p in fresh.state_dict().items():
        assert torch.equal(p, source[name] if name.startswith("encoder.") else before[name]), name
    same = tiny("ctc")
    assert begin_with(same, str(tmp_path / "ctc")) == sum(p.numel() for p in same.parameters())
    assert begin_with(tiny("both"), str(tmp_path / "deep")) > 0  # its first layer
    untouched = tiny("transducer")
    with pytest.raises(ValueError, match=r"of the [\d,]+ numbers that this model shares with the checkpoint .*wide' by name, only [\d,]+ fit by shape; are d_model and n_bins the same\?"):
        begin_with(untouched, str(tmp_path / "wide"))
    assert all(torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), tiny("transducer").state_dict().values()))
    with pytest.raises(ValueError, match="no weight of the checkpoint .*ctc' fits this model by name and shape"):
        begin_with(torch.nn.Linear(3, 3), str(tmp_path / "ctc"))
    with pytest.raises(CheckpointError):
        begin_with(untouched, str(tmp_path / "nowhere"))


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder like the Free Spoken Digit Dataset, cut from the sampler."""
    folder, made = tmp_path_factory.mktemp("fsdd"), set()
    (folder / "recordings").mkdir()
    for utterance in sampler()[:8]:
        waveform = utterance.waveform()
        for word in utterance.words:
            if word.text not in made:
                made.add(word.text)
                for take in (0, 5, 10):
                    save(folder / "recordings" / f"{DIGITS.index(word.text)}_ann_{take}.wav", waveform[round(word.start * RATE) : round(word.end * RATE)], RATE)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("SPEECHLEARN_FSDD", raising=False)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_models_of_the_command_line():
    for name, head in (("ctc", "ctc"), ("transducer", "transducer"), ("ctc+transducer", "both")):
        model, vocabulary = make_model(Recipe(model=name, vocabulary="letters", d_model=16, n_layers=2, fast_emit=0.02))
        c = model.config
        assert (c.head, c.vocab, c.blank, c.d_model, c.n_layers, c.d_feedforward, c.fast_emit) == (head, len(vocabulary), vocabulary.blank, 16, 2, 64, 0.02)
        assert (c.decoder_dim, c.joiner_dim) == (16, 16)


@pytest.mark.parametrize("name", ["ctc", "transducer", "ctc+transducer"])
def test_train_stop_resume_evaluate(run, clips, tmp_path, monkeypatch, name):
    settings = {
        "model": name, "corpus": "fsdd:6", "root": str(clips), "speakers": "ann", "vocabulary": "words", "d_model": 16, "n_layers": 1, "n_bins": 40, "top_hz": 3800.0,
        "steps": 4, "validate_every": 2, "max_frames": 1000, "fast_emit": 0.01,
    }
    (tmp_path / "a.json").write_text(json.dumps(settings))
    command = ["train", "--config", tmp_path / "a.json"]
    code, out, err = run(*command, "--directory", tmp_path / "whole")
    assert code == 0, err
    keep = speechlearn.training.save_run

    def interrupted(run):
        keep(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(speechlearn.training, "save_run", interrupted)
        assert run(*command, "--directory", tmp_path / "parts", "--resume")[0] == 130
    assert run(*command, "--directory", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (load_checkpoint(tmp_path / folder / "recogniser").model for folder in ("whole", "parts"))
    assert type(whole) is AlignmentRecogniser and whole.config.head == {"ctc+transducer": "both"}.get(name, name)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    assert name == "ctc" or int(whole.trained_steps) == 4
    code, out, err = run("evaluate", "--checkpoint", tmp_path / "whole" / "recogniser", "--corpus", "fsdd", "--root", clips, "--utterances", 2, "--json")
    assert code == 0 and "wer" in json.loads(out), err


def test_a_training_that_begins_with_another_model(run, clips, tmp_path):
    save_checkpoint(tmp_path / "ctc", make_model(Recipe(model="ctc", d_model=16, n_layers=1, seed=5))[0], vocabulary=CharacterVocabulary(), features={}, metadata={})
    command = ["train", "--model", "transducer", "--corpus", "fsdd:4", "--root", clips, "--speakers", "ann", "--n-layers", 1, "--steps", 1, "--max-frames", 1000, "--learning-rate", 1e-9, "--average", 0]
    assert run(*command, "--d-model", 16, "--start-from", tmp_path / "ctc", "--directory", tmp_path / "run")[0] == 0
    trained, source = (load_checkpoint(tmp_path / path).model.encoder for path in ("run/recogniser", "ctc"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained.parameters(), source.parameters()))  # one step of 1e-9
    shutil.move(tmp_path / "ctc", tmp_path / "moved")  # a run that goes on does not ask for it
    code, out, err = run(*command, "--d-model", 16, "--start-from", tmp_path / "ctc", "--directory", tmp_path / "run", "--resume")
    assert code == 0, err
    shutil.move(tmp_path / "moved", tmp_path / "ctc")
    for more, says in ((["--d-model", 32, "--start-from", tmp_path / "ctc"], "are d_model and n_bins the same?"), (["--d-model", 16, "--start-from", tmp_path / "none"], "none")):
        code, out, err = run(*command, *more, "--directory", tmp_path / "other")
        assert code == 1 and out == "" and says in err and not (tmp_path / "other").exists()
