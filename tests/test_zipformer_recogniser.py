"""The recogniser around a Zipformer: losses, ways to read, checkpoints, and training by the command line."""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from zipformer_tools import randn

from speechlearn.alignment.forced import forced_alignment
from speechlearn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from speechlearn.cli import main
from speechlearn.data.batches import Batch, SpeechDataset
from speechlearn.data.synthetic import make_corpus, sampler
from speechlearn.models import Losses, total_loss
from speechlearn.recipes import Recipe, make_model, run_training
from speechlearn.recogniser import Recogniser
from speechlearn.sound.features import LogMel, normalise_fixed
from speechlearn.text import CharacterVocabulary
from speechlearn.zipformer.convolution import encoder_lengths
from speechlearn.zipformer.encoder import count_parameters
from speechlearn.zipformer.recogniser import ZipformerRecogniser, ZipformerRecogniserConfig, small_config, twice
from speechlearn.zipformer.streaming import StreamingEncoder

VOCABULARY = CharacterVocabulary()
SIZES = dict(
    n_bins=20, front_channels=(4, 4, 8), encoder_dim=(16, 24), downsampling_factor=(1, 2), encoder_unmasked_dim=(16, 16), num_encoder_layers=(1, 1), feedforward_dim=(32, 48), num_heads=(2, 2),
    cnn_module_kernel=(7, 7), query_head_dim=4, pos_head_dim=2, value_head_dim=4, pos_dim=8, decoder_dim=16, joiner_dim=16, attention_dim=16, n_decoder_heads=2, decoder_feedforward=32,
)


def make(heads="ctc", seed=0, **changes):
    torch.manual_seed(seed)
    model = ZipformerRecogniser(ZipformerRecogniserConfig(len(VOCABULARY), heads=heads, **{**SIZES, **changes}))
    with torch.no_grad():  # a fresh model says the same at every step
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def a_batch(texts=("turn on", "a lamp", "no"), frames=(150, 130, 110), seed=0):
    ids = [torch.tensor(VOCABULARY.encode(text)) for text in texts]
    lengths = torch.tensor(frames)
    features = randn(len(texts), max(frames), 20, seed=seed, dtype=torch.float32)
    features = features * (torch.arange(max(frames)) < lengths[:, None])[..., None]
    return Batch(features, lengths, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=VOCABULARY.pad), torch.tensor([len(i) for i in ids]), list(texts), [f"u{i}" for i in range(len(texts))])


class TestConfig:
    @pytest.mark.parametrize(
        "wrong, said",
        [
            (dict(heads="ctx"), "choose ctc, transducer or attention"), (dict(heads="ctc+ctc"), "choose"), (dict(heads=""), "choose"), (dict(n_bins=0), "n_bins is 0"),
            (dict(prune_range=1), "at least 2"), (dict(eos=99), "blank, sos and eos"), (dict(dropout=1.5), "expected 0 to 1"),
        ],
    )
    def test_wrong_settings(self, wrong, said):
        with pytest.raises(ValueError, match=said):
            ZipformerRecogniserConfig(30, **wrong)

    @pytest.mark.parametrize("size, published", [("S", "S"), ("M", "M")])
    def test_published_sizes(self, size, published):
        """The same encoder as `make_asr_model`, name by name and shape by shape."""
        from speechlearn.models import make_asr_model

        shapes = lambda model: {name: tuple(p.shape) for name, p in model.state_dict().items()}
        assert shapes(small_config(size, 500, heads="transducer", n_bins=80).make()) == shapes(make_asr_model(published))

    def test_small_sizes_grow(self):
        n = [count_parameters(small_config(size, 64).make()) for size in ("tiny", "small", "medium")]
        assert n == sorted(n) and n[0] < n[2]
        with pytest.raises(ValueError, match="no size 'XL'"):
            small_config("XL", 64)

    def test_causal_sizes_can_stream(self):
        for size in ("tiny", "small", "medium", "S"):
            config = small_config(size, 64, causal=True)
            config = dataclasses.replace(config, chunk_size=config.chunk_size[:1], left_context_frames=config.left_context_frames[:1])
            model = config.make()
            StreamingEncoder(model.encoder_embed, model.encoder)


class TestLoss:
    @pytest.mark.parametrize("heads", ["ctc", "transducer", "attention", "ctc+attention", "ctc+transducer", "ctc+transducer+attention"])
    def test_it_is_the_recipes_sum_for_each_symbol(self, heads):
        model, batch = make(heads), a_batch()
        parts = model.loss(batch)
        losses = model.model(batch.features, batch.feature_lengths, batch.targets, batch.target_lengths)
        n = int(batch.target_lengths.sum())
        torch.testing.assert_close(parts["loss"], total_loss(losses, model.config.warm_steps, warm_step=model.config.warm_steps) / n)
        names = {name for name, value in losses._asdict().items() if value is not None}
        assert names == {"ctc": {"ctc"}, "transducer": {"simple", "pruned"}, "attention": {"attention"}}.get(heads, names) and set(parts) >= names
        for name in names:
            torch.testing.assert_close(parts[name], getattr(losses, name) / n)

    def test_ctc_is_torchs(self):
        model, batch = make(), a_batch()
        out, steps = model(batch.features, batch.feature_lengths)
        log_probs = model.model.ctc_output(out)
        expected = F.ctc_loss(log_probs.transpose(0, 1), batch.targets, steps, batch.target_lengths, reduction="sum") / batch.target_lengths.sum()
        torch.testing.assert_close(model.loss(batch)["loss"], expected)

    @pytest.mark.parametrize("heads", ["ctc", "ctc+attention", "ctc+transducer"])
    def test_what_cannot_be_aligned_is_left_out_and_counted(self, heads):
        """Sound of 14 steps for 30 letters: the others' loss is the one without it."""
        model = make(heads)
        long = "set the alarm for ten to seven"
        mixed, clean = a_batch(("turn on", long, "no"), (150, 60, 110)), a_batch(("turn on", "no"), (150, 110))
        clean.features[:] = mixed.features[[0, 2]]
        assert int(encoder_lengths(torch.tensor([60]))) < len(long)
        parts, expected = model.loss(mixed), model.loss(clean)
        torch.testing.assert_close(parts["loss"], expected["loss"])
        assert float(parts["too_short"]) == pytest.approx(1 / 3) and float(expected["too_short"]) == 0

    def test_nothing_can_be_aligned(self):
        with pytest.raises(ValueError, match="no utterance of the batch.*40 ms.*larger symbols"):
            make().loss(a_batch(("turn on the kitchen light",), (60,)))

    def test_a_transducer_takes_short_sounds(self):
        assert make("transducer").loss(a_batch(("turn on the light",), (60,)))["loss"].isfinite()

    def test_seen_twice(self):
        """Two equal copies in evaluation: nothing to disagree about, and each half counts half."""
        model, batch = make("ctc+attention"), a_batch()
        once, both = model.loss(batch), model.loss(twice(batch), twice=True)
        torch.testing.assert_close(both["loss"], once["loss"])
        assert abs(float(both["consistency"].detach())) < 1e-5
        different = twice(batch)
        different.features[3:, 20:60] = 0.0
        assert float(model.loss(different, twice=True)["consistency"].detach()) > 1e-3

    def test_weights_change_with_the_steps_of_training(self):
        model, batch = make("transducer", warm_steps=4), a_batch()
        model.train()
        for parameter in (m for m in model.modules() if hasattr(m, "p") and isinstance(m, torch.nn.Dropout)):
            parameter.p = 0.0
        seen = []
        for step in range(6):
            parts = model.loss(batch)
            total = total_loss(Losses(simple=parts["simple"], pruned=parts["pruned"]), step, warm_step=4)
            seen.append((float(parts["loss"].detach()), float(total)))
        assert all(got == pytest.approx(expected, rel=1e-5) for got, expected in seen) and int(model.trained_steps) == 6
        model.eval()
        model.loss(batch)
        assert int(model.trained_steps) == 6, "validation does not count"


class TestReading:
    def test_greedy_ctc_by_hand(self):
        model, batch = make("ctc"), a_batch()
        out, steps = model(batch.features, batch.feature_lengths)
        log_probs = model.model.ctc_output(out)
        log_probs[..., 1:4] = -math.inf  # padding, start and end must not be written
        for i, words in enumerate(model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=1, way="ctc")):
            best = log_probs[i, : int(steps[i])].argmax(dim=-1).tolist()
            tokens = [t for t, before in zip(best, [0, *best]) if t != before and t != 0]
            assert " ".join(w for w, _, _ in words) == " ".join(VOCABULARY.decode(tokens).split())
            assert all(0 <= first <= last < int(steps[i]) for _, first, last in words)

    def test_prefix_search_places_words_by_alignment(self):
        model, batch = make("ctc"), a_batch(("turn on",), (150,))
        words = model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=4, way="ctc")[0]
        out, steps = model(batch.features, batch.feature_lengths)
        tokens = VOCABULARY.encode(" ".join(word for word, _, _ in words))
        if tokens:
            aligned = forced_alignment(model.model.ctc_output(out), torch.tensor([tokens]), steps, torch.tensor([len(tokens)]), blank=0)[0]
            assert words[0][1] == aligned.spans[0][0] and words[-1][2] == aligned.spans[-1][1]

    def test_attention_with_a_beam_of_one_is_a_loop(self):
        model, batch = make("attention"), a_batch()
        out, steps = model(batch.features, batch.feature_lengths)
        decoder = model.model.attention_decoder
        for i, words in enumerate(model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=1)):
            n, written = int(steps[i]), []
            while len(written) < n:
                y = torch.tensor([[VOCABULARY.sos, *written]])
                logits = decoder.decoder(y, torch.tensor([y.shape[1]]), out[i : i + 1, :n], steps[i : i + 1])[0, -1]
                logits[[0, 1, 2]] = -math.inf
                if int(logits.argmax()) == VOCABULARY.eos:
                    break
                written.append(int(logits.argmax()))
            assert "".join(w for w, _, _ in words) == VOCABULARY.decode(written).replace(" ", "")
            places = [place for _, *span in words for place in span]
            assert places == sorted(places) and all(0 <= place < n for place in places)

    @torch.no_grad()
    def test_rescoring_by_hand(self):
        """Of the texts of CTC's search, the one with the best weighted sum."""
        from speechlearn.alignment.search import prefix_beam_search

        model, batch = make("ctc+attention", seed=3, attention_scale=0.7), a_batch(("turn on",), (150,))
        out, steps = model(batch.features, batch.feature_lengths)
        found = prefix_beam_search(model.model.ctc_output(out), steps, blank=0, beam=5, never=(1, 2, 3), threshold=-10.0)[0]
        scores = {}
        for h in found:
            y = torch.tensor([[VOCABULARY.sos, *h.tokens]])
            log_probs = model.model.attention_decoder.decoder(y, torch.tensor([y.shape[1]]), out, steps)[0].log_softmax(dim=-1)
            attention = sum(float(log_probs[i, token]) for i, token in enumerate([*h.tokens, VOCABULARY.eos]))
            scores[VOCABULARY.decode(h.tokens)] = 0.3 * h.log_prob + 0.7 * attention
        best = max(scores, key=scores.get)
        words = model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=5)[0]
        assert len(scores) > 1 and [w for w, _, _ in words] == best.split()

    def test_transducer(self):
        """A beam finds a text that is at least as likely, over all paths of the lattice, as the greedy one; steps never run backwards."""
        from speechlearn.alignment.transducer import transducer_loss
        from speechlearn.alignment.transducer_search import transducer_greedy

        model, batch = make("transducer"), a_batch()
        out, steps = model(batch.features, batch.feature_lengths)
        m = model.model

        def log_prob(i, tokens):
            y = torch.tensor([[0, *tokens]])
            logits = m.joiner(m.joiner.encoder_proj(out[i : i + 1, : int(steps[i])])[:, :, None], m.joiner.decoder_proj(m.decoder(y))[:, None], project_input=False)
            return -float(transducer_loss(logits, y[:, 1:], steps[i : i + 1], torch.tensor([len(tokens)]), blank=0))

        with torch.no_grad():
            greedy = transducer_greedy(out, steps, decoder=m.decoder, joiner=m.joiner, max_symbols=3, never=(1, 2, 3))
            for i, words in enumerate(model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=8)):
                tokens = VOCABULARY.encode(" ".join(word for word, _, _ in words)) if words else []
                assert log_prob(i, tokens) >= log_prob(i, list(greedy[i].tokens))
                places = [place for _, *span in words for place in span]
                assert places == sorted(places)

    @torch.no_grad()
    def test_transducer_with_a_beam_of_one_is_a_loop(self):
        """At each step the likeliest symbol, until it is the blank: a search with one text in hand would prefer the blank."""
        model, batch = make("transducer"), a_batch()
        m, (out, steps) = model.model, model(batch.features, batch.feature_lengths)
        m.joiner.output_linear.bias[0] -= 1.0  # so that there is something to write
        found = 0
        for i, words in enumerate(model.recognise(batch.features, batch.feature_lengths, VOCABULARY, beam=1)):
            tokens = []
            for t in range(int(steps[i])):
                for _ in range(3):
                    y = torch.tensor([[0, *tokens]])
                    logits = m.joiner(m.joiner.encoder_proj(out[i : i + 1, t : t + 1])[:, :, None], m.joiner.decoder_proj(m.decoder(y))[:, None, -1:], project_input=False).flatten()
                    logits[[1, 2, 3]] = -math.inf
                    if int(logits.argmax()) == 0:
                        break
                    tokens.append(int(logits.argmax()))
            assert "".join(w for w, _, _ in words) == VOCABULARY.decode(tokens).replace(" ", "")
            found += len(tokens)
        assert found > 0

    @pytest.mark.parametrize("heads, way", [("ctc", "transducer"), ("transducer", "ctc"), ("ctc", "rescoring"), ("ctc+transducer", "attention"), ("ctc", "telepathy")])
    def test_a_way_needs_its_head(self, heads, way):
        batch = a_batch()
        with pytest.raises(ValueError, match=f"way is '{way}'"):
            make(heads).recognise(batch.features, batch.feature_lengths, VOCABULARY, way=way)


class TestCausal:
    CAUSAL = dict(causal=True, chunk_size=(8, 16, -1), left_context_frames=(16, 32, -1))

    def test_outside_training_there_is_one_chunk_size(self):
        model, batch = make("ctc", **self.CAUSAL), a_batch()
        model.model.encoder.chunk_size, model.model.encoder.left_context_frames = (8,), (16,)
        expected = model.model.forward_encoder(batch.features, batch.feature_lengths)[0]
        model.model.encoder.chunk_size, model.model.encoder.left_context_frames = (8, 16, -1), (16, 32, -1)
        for _ in range(5):
            assert torch.equal(model(batch.features, batch.feature_lengths)[0], expected)
        assert model.model.encoder.chunk_size == (8, 16, -1), "training still draws"

    def test_the_settings_come_back_after_an_error(self):
        model = make("ctc", **self.CAUSAL)
        with pytest.raises(ValueError):
            model(randn(1, 3, 20, dtype=torch.float32), torch.tensor([3]))
        assert model.model.encoder.chunk_size == (8, 16, -1)

    def test_it_asks_for_fixed_normalisation(self):
        """The recogniser gives the model what the training gave it."""
        assert make("ctc").normalise == "utterance"
        model, seen = make("ctc", **self.CAUSAL), []
        model.recognise = lambda features, lengths, vocabulary: seen.append(features) or [[]]
        recogniser = Recogniser(model, VOCABULARY, features=dict(n_bins=20))
        utterance = sampler()[0]
        waveform = utterance.waveform(16_000)
        recogniser.transcribe(waveform, 16_000)
        item = SpeechDataset(sampler()[:1], LogMel(n_bins=20), VOCABULARY, normalise="running")[0]
        got = seen[0][0, : len(item.features)]
        assert (got - item.features).abs().median() < 0.02  # the faint noise under every recording moves the quiet places
        other = SpeechDataset(sampler()[:1], LogMel(n_bins=20), VOCABULARY)[0]
        assert (got - other.features).abs().median() > 0.1, "that is the normalisation of a whole utterance"

    def test_fixed_normalisation(self):
        x, lengths = randn(2, 7, 5, dtype=torch.float32), torch.tensor([7, 4])
        y = normalise_fixed(x, lengths)
        torch.testing.assert_close(y[0], (x[0] + 4) / 4)
        assert torch.equal(y[1, 4:], torch.zeros(3, 5)) and torch.equal(normalise_fixed(x[1:, :2], torch.tensor([2]))[0], y[1, :2])
        with pytest.raises(ValueError, match="'utterance', 'running', 'fixed' or 'none'"):
            SpeechDataset(sampler(), LogMel(), VOCABULARY, normalise="global")


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        model, batch = make("ctc+attention"), a_batch()
        model.trained_steps += 7
        save_checkpoint(tmp_path / "z", model, vocabulary=VOCABULARY, features=dict(n_bins=20))
        loaded = load_checkpoint(tmp_path / "z").model.eval()
        assert loaded.config == model.config and int(loaded.trained_steps) == 7
        assert torch.equal(loaded(batch.features, batch.feature_lengths)[0], model(batch.features, batch.feature_lengths)[0])

    def test_damaged(self, tmp_path):
        folder = save_checkpoint(tmp_path / "z", make(), vocabulary=VOCABULARY, features=dict(n_bins=20))
        content = json.loads((folder / "checkpoint.json").read_text())
        content["config"]["heads"] = "transducer"
        (folder / "checkpoint.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)


class TestTraining:
    SIZES = {name: value for name, value in SIZES.items() if name != "n_bins"}
    RECIPE = dict(model="zipformer", corpus="tiny", utterances=8, vocabulary="letters", n_bins=20, augment=False, steps=4, validate_every=2, max_frames=1500, threads=1, learning_rate=2e-3)

    def test_schedules_follow_the_clock(self, tmp_path, monkeypatch):
        import speechlearn.zipformer.scaling as scaling

        told, real = [], scaling.set_batch_count
        monkeypatch.setattr(scaling, "set_batch_count", lambda model, count: told.append(count) or real(model, count))
        run_training(Recipe(**self.RECIPE, schedule_steps=2), tmp_path / "run", show="none", sizes=self.SIZES)
        assert told == [0.0, 10_000.0, 20_000.0, 20_000.0]

    @pytest.mark.parametrize("extra", [dict(heads="ctc+attention", consistency=True, masks=1), dict(heads="transducer", causal=True, optimiser="scaled-adam", schedule="eden", learning_rate=0.05)])
    def test_an_interrupted_run_goes_on_exactly(self, extra, tmp_path):
        """Four steps, or two and then two more in a new call: the same weights, bit for bit.

        In a process of its own: the checker of shapes, which is on in these tests, draws from the same random numbers as the Zipformer's modules.
        """
        code = """
import json, sys
import torch
import speechlearn.training as training
from speechlearn.recipes import Recipe, run_training
recipe, sizes, folder = Recipe(**json.loads(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3]
whole = run_training(recipe, folder + "/whole", show="none", sizes=sizes)
real = training.take_step
def until_two(run):
    if run.step == 2:
        raise KeyboardInterrupt
    return real(run)
training.take_step = until_two
try:
    run_training(recipe, folder + "/parts", show="none", sizes=sizes)
    sys.exit("the run was not interrupted")
except KeyboardInterrupt:
    training.take_step = real
parts = run_training(recipe, folder + "/parts", resume=True, show="none", sizes=sizes)
different = [name for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values()) if not torch.equal(a, b)]
sys.exit(f"different: {different[:3]}" if different else 0)
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, json.dumps({**self.RECIPE, **extra}), json.dumps(self.SIZES), str(tmp_path)], check=True)

    def test_start_from(self, tmp_path):
        """A transducer begins with the encoder of a CTC model."""
        from speechlearn.recipes import begin_with

        ctc = run_training(Recipe(**self.RECIPE), tmp_path / "ctc", show="none", sizes=self.SIZES)
        model, _ = make_model(Recipe(**{**self.RECIPE, "heads": "transducer", "seed": 1}), self.SIZES)
        n = begin_with(model, str(tmp_path / "ctc" / "recogniser"))
        assert n == sum(p.numel() for part in (model.model.encoder, model.model.encoder_embed) for p in part.parameters())
        assert torch.equal(model.model.encoder_embed.out.weight, ctc.model.model.encoder_embed.out.weight)

    def test_it_learns_by_heart(self, tmp_path):
        """Two utterances, said back without an error: front end, encoder, loss, clock and search fit together."""
        corpus = make_corpus("tiny", "train", n=2)
        from speechlearn.data.batches import make_loader
        from speechlearn.training import TrainConfig, train
        from speechlearn.zipformer.scaling import set_batch_count

        torch.manual_seed(0)
        model = ZipformerRecogniser(small_config("tiny", len(VOCABULARY), **{**SIZES, "encoder_dim": (32, 48), "encoder_unmasked_dim": (32, 32), "dropout": 0.0}))
        loader = make_loader(SpeechDataset(corpus, LogMel(n_bins=20), VOCABULARY, keep=True), max_frames=3000)
        config = TrainConfig(n_steps=120, learning_rate=8e-3, warmup_steps=10, seed=0)
        train(model, loader, config=config, show="none", on_step=lambda model, step: set_batch_count(model, 20_000.0))
        recogniser = Recogniser(model, VOCABULARY, features=dict(n_bins=20))
        assert [recogniser.transcribe(u.waveform(16_000), 16_000).text for u in corpus] == [u.text for u in corpus]

    def test_command_line(self, tmp_path, capsys):
        settings = [f"--{key.replace('_', '-')}={value}" for key, value in self.RECIPE.items() if not isinstance(value, bool)]
        assert main(["train", "--directory", str(tmp_path / "run"), *settings, "--no-augment", "--heads", "ctc+transducer", "--schedule-steps", "2", "--steps", "2"]) == 0
        assert main(["evaluate", "--checkpoint", str(tmp_path / "run" / "recogniser"), "--corpus", "tiny", "--utterances", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["utterances"] == 2

    @pytest.mark.parametrize(
        "wrong, said",
        [
            (dict(consistency=True), "masks of at least 1"), (dict(consistency=True, masks=1, heads="transducer"), "needs ctc among the heads"), (dict(model="ctc", causal=True), "settings of a zipformer"),
            (dict(optimiser="sgd"), "choose adamw or scaled-adam"), (dict(schedule_steps=-1), "expected 0 or more"),
            (dict(size="tinny"), "'tinny'; choose tiny"), (dict(heads="ctcc"), "'ctcc'; choose ctc"), (dict(heads="ctc+ctc"), "joined by"),
            (dict(learning_rate=-1.0), "expected above 0"), (dict(learning_rate=float("nan")), "expected above 0"), (dict(warmup_steps=-3), "warmup_steps -3"),
        ],
    )
    def test_wrong_recipes(self, wrong, said):
        with pytest.raises(ValueError, match=said):
            Recipe(**{**dict(model="zipformer"), **wrong})
        if wrong == dict(consistency=True):
            with pytest.raises(ValueError, match="sizes are settings of a zipformer"):
                make_model(Recipe(), {"dropout": 0.0})
