"""Downloaded checkpoints of the reference: sizes from shapes, symbols, folders, features as the recipe has them, greedy texts, refusals, the command.

No published file can be had here; the folders have their layout, with weights by chance.
"""
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from speechlearn.checkpoint import CheckpointError
from speechlearn.cli import main
from speechlearn.data.corpora import Word
from speechlearn.models import AsrModel, make_asr_model
from speechlearn.recogniser import pieces
from speechlearn.reference import ReferenceRecogniser, architecture, find_reference, join_pieces, load_reference_recogniser, read_tokens, reference_features
from speechlearn.sound.waveform import save
from speechlearn.zipformer import v1
from speechlearn.zipformer.convolution import Conv2dSubsampling
from speechlearn.zipformer.encoder import Zipformer2, zipformer_config

RATE = 16_000
SMALL = dict(downsampling_factor=(1, 2), encoder_dim=(24, 32), num_encoder_layers=(1, 2), encoder_unmasked_dim=(24, 24), num_heads=(2, 4), feedforward_dim=(32, 48), cnn_module_kernel=(15, 7))
TOKENS = ["<blk>", "<sos/eos>", "<unk>", "▁HA", "T", "▁ON", "▁", "S"]


def sound(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(n) / RATE
    return 0.1 * torch.randn(n, generator=generator) * (1.2 + torch.sin(11 * t)) + 0.3 * torch.sin(2 * math.pi * (300 + 250 * torch.sin(5 * t)) * t)


def features_of_the_recipe(waveform):
    """As torchaudio computes Kaldi's filter banks with the recipe's options."""
    import torchaudio  # after speechlearn, which makes it load without CUDA

    return torchaudio.compliance.kaldi.fbank(waveform[None], num_mel_bins=80, frame_length=25, frame_shift=10, sample_frequency=RATE, dither=0.0, snip_edges=False, low_freq=20, high_freq=-400)


@torch.no_grad()
def made(*, causal=False, transducer=True, ctc=False, seed=0):
    """A small model of the reference's kind whose heads write something else at each moment."""
    torch.manual_seed(seed)
    changes = SMALL | (dict(chunk_size=[-1], left_context_frames=[-1]) if causal else {})
    model = make_asr_model("S", causal=causal, vocab_size=len(TOKENS), use_transducer=transducer, use_ctc=ctc, **changes).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
    out = model.forward_encoder(features_of_the_recipe(sound(48_000))[None], torch.tensor([300]))[0][0]
    for layer in filter(None, (ctc and model.ctc_output[1], transducer and model.joiner.encoder_proj)):
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.weight.mul_(2 / (out @ layer.weight.T).std(dim=0)[:, None])
        layer.bias.copy_(-layer.weight @ out.mean(dim=0))
    return model


def write_folder(folder, model, *, name="pretrained.pt", tokens=TOKENS, wrap=lambda state: {"model": state}):
    folder.mkdir(parents=True, exist_ok=True)
    state = model if isinstance(model, dict) else model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / name) if name.endswith(".safetensors") else torch.save(wrap(state), folder / name)
    (folder / "tokens.txt").write_text("".join(f"{token} {i}\n" for i, token in enumerate([*tokens, "#0", "#1"])), encoding="utf-8")
    return folder


@torch.no_grad()
def text_by_hand(model, waveform, causal):
    """Greedy decoding, written down step by step."""
    x = features_of_the_recipe(waveform)
    if causal:
        x = torch.cat([x, torch.full((30, 80), math.log(1e-10))])
    out = model.forward_encoder(x[None], torch.tensor([len(x)]))[0][0]
    found = []
    if model.joiner is None:
        last = 0
        for step, row in enumerate(model.ctc_output(out)):
            row[[1, 2]] = -math.inf
            symbol = int(row.argmax())
            if symbol not in (0, last):
                found.append((symbol, step))
            last = symbol
    else:
        context = [-1, 0]
        for step, frame in enumerate(out):
            text = model.decoder(torch.tensor([context]), need_pad=False)[0, 0]
            logits = model.joiner.output_linear(torch.tanh(model.joiner.encoder_proj(frame) + model.joiner.decoder_proj(text)))
            logits[[1, 2]] = -math.inf
            symbol = int(logits.argmax())
            if symbol != 0:
                found.append((symbol, step))
                context = [context[1], symbol]
    text = "".join(TOKENS[symbol] for symbol, _ in found)
    return " ".join(text.replace("▁", " ").split()), found


class TestSizes:
    @pytest.mark.parametrize("size", ["S", "M", "L"])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("heads", [("transducer",), ("ctc",), ("transducer", "ctc"), ("ctc", "attention")], ids="+".join)
    def test_published(self, size, causal, heads):
        vocab = 500 if causal else 5000
        with torch.device("meta"):
            state = make_asr_model(size, causal=causal, vocab_size=vocab, **{f"use_{head}{'_decoder' if head == 'attention' else ''}": head in heads for head in ("transducer", "ctc", "attention")}).state_dict()
            found = architecture(state)
            again = found.make().state_dict()
        assert (found.size, found.causal, found.vocab, found.heads) == (size, causal, vocab, heads)
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items() if not k.startswith("attention_decoder.")}
        for name, value in zipformer_config(size).items():
            if name not in ("encoder_unmasked_dim",):
                assert found.encoder[name] in (value, (value,) * 6), name

    @pytest.mark.parametrize("causal", [False, True])
    def test_any_other(self, causal):
        encoder = dict(
            downsampling_factor=(1, 4, 2), encoder_dim=(24, 40, 32), num_encoder_layers=(1, 3, 2), encoder_unmasked_dim=(24, 24, 24), query_head_dim=8, pos_head_dim=4, value_head_dim=6, num_heads=(2, 5, 4),
            feedforward_dim=(32, 48, 64), cnn_module_kernel=(7, 15, 31), pos_dim=16, causal=causal,
        )
        model = AsrModel(Conv2dSubsampling(80, 24, 4, 6, 12), Zipformer2(**encoder), 40, 30, use_ctc=True, decoder_dim=20, joiner_dim=28, context_size=3).eval()
        found = architecture(model.state_dict())
        again = found.make().eval()
        assert found.size == "other" and found.causal == causal and found.front_channels == (4, 6, 12) and (found.decoder_dim, found.joiner_dim, found.context_size) == (20, 28, 3)
        again.load_state_dict(model.state_dict(), strict=True)
        x, lengths = torch.randn(2, 120, 80), torch.tensor([120, 90])
        with torch.no_grad():
            for ours, expected in zip(again.forward_encoder(x, lengths), model.forward_encoder(x, lengths)):
                assert torch.equal(ours, expected)

    def test_predictor_of_one_symbol(self):
        model = AsrModel(Conv2dSubsampling(80, 24), Zipformer2(**{**zipformer_config("S"), **SMALL}), 32, 30, decoder_dim=20, joiner_dim=28, context_size=1)
        assert architecture(model.state_dict()).context_size == 1

    def test_first_version(self):
        with torch.device("meta"):
            first = v1.Zipformer(80)
        state = {f"encoder.{k}": v for k, v in first.state_dict().items()}
        assert any(".pooling." in name for name in state)
        with pytest.raises(CheckpointError, match=r"first Zipformer \(2022\).*speechlearn.zipformer.v1"):
            architecture(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: {"weight": torch.zeros(2)}, "not the weights of a Zipformer of the reference.*first names here are weight"),
            (lambda s: {k: v for k, v in s.items() if not k.startswith(("joiner", "ctc_output"))}, "neither a transducer .* nor a CTC head"),
            (lambda s: s | {"encoder_embed.out.weight": torch.zeros(24, 128 * 9)}, "about 40 mel bins; the recipe that is followed here has 80"),
            (lambda s: {k: v for k, v in s.items() if "feed_forward2" not in k}, r"the tensor encoder.encoders.0.layers.0.feed_forward2.in_proj.weight is missing"),
            (lambda s: s | {"encoder.encoders.0.layers.0.self_attn_weights.linear_pos.weight": torch.zeros(9, 48)}, "stack 0 has attention with 9 rows for positions"),
        ],
    )
    def test_what_is_no_such_model(self, change, message):
        with pytest.raises(CheckpointError, match=message):
            architecture(change(made().state_dict()))


class TestSymbols:
    def write(self, tmp_path, text):
        path = tmp_path / "tokens.txt"
        path.write_text(text, encoding="utf-8")
        return path

    def test_as_published(self, tmp_path):
        path = self.write(tmp_path, "<blk> 0\n<sos/eos> 1\n<unk> 2\n▁THE 3\n\n' 4\n#0 5\n#1 6\n")
        assert read_tokens(path, 5) == ["<blk>", "<sos/eos>", "<unk>", "▁THE", "'"]

    def test_tabs_any_order_and_a_space(self, tmp_path):
        assert read_tokens(self.write(tmp_path, "b\t2\n<blk> 0\r\n  1\n"), 3) == ["<blk>", " ", "b"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<blk> 0\na 1\n", "the model, which has 3 symbols: number 2 is missing. Do both come from the same download"), ("<blk> 0\na 1\nb 2\nc 3\n", r"number 3 \('c'\) is beyond it"),
            ("<blk> 0\na 1\nb 1\n", "gives number 1 to 'a' and to 'b'"), ("<blk> 0\nb\n", "line 2 of .* is 'b'; expected a symbol and its number"), ("", "number 0 is missing"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, text, message):
        with pytest.raises(CheckpointError, match=message):
            read_tokens(self.write(tmp_path, text), 3)

    def test_no_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            read_tokens(tmp_path / "tokens.txt", 3)
        (tmp_path / "tokens.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_tokens(tmp_path / "tokens.txt", 3)

    def test_pieces_to_words(self):
        assert join_pieces([(3, 0), (4, 2), (7, 3), (5, 9)], TOKENS) == [("HATS", 0, 3), ("ON", 9, 9)]
        assert join_pieces([(4, 1), (6, 2), (7, 3), (6, 4)], TOKENS) == [("T", 1, 1), ("S", 2, 3)]  # begins inside a word; ▁ of its own
        assert join_pieces([], TOKENS) == []
        assert join_pieces([(1, 0), (2, 1)], ["<blk>", "你", "好"]) == [("你", 0, 0), ("好", 1, 1)]


class TestFolders:
    def test_as_published(self, tmp_path):
        for name in ("exp/pretrained.pt", "exp/cpu_jit.pt", "exp/encoder.onnx", "data/lang_bpe_500/tokens.txt", "data/lang_bpe_500/bpe.model", "README.md"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert find_reference(tmp_path) == (tmp_path / "exp/pretrained.pt", tmp_path / "data/lang_bpe_500/tokens.txt")
        (tmp_path / "exp/epoch-30.pt").touch()
        with pytest.raises(CheckpointError, match="there are 2 files that may be the file of weights in .*: exp/epoch-30.pt, exp/pretrained.pt. Name the one you want"):
            find_reference(tmp_path)
        named = tmp_path / "exp/epoch-30.pt"
        assert find_reference(named)[0] == named and find_reference(named)[1].samefile(tmp_path / "data/lang_bpe_500/tokens.txt")
        (tmp_path / "exp/tokens.txt").touch()
        assert find_reference(named)[1].samefile(tmp_path / "exp/tokens.txt")
        with pytest.raises(CheckpointError, match="2 files that may be the tokens.txt"):
            (tmp_path / "exp/epoch-30.pt").unlink()
            find_reference(tmp_path)

    def test_what_is_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="is no folder; --reference wants the folder"):
            find_reference(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match=r"there is no file of weights in .*; expected pretrained.pt, epoch-\*.pt or \*.safetensors$"):
            find_reference(tmp_path)
        (tmp_path / "jit_script.pt").touch()
        with pytest.raises(CheckpointError, match="jit_script.pt cannot be used: exported programs are no weights"):
            find_reference(tmp_path)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(CheckpointError, match="there is no tokens.txt in"):
            find_reference(tmp_path)


class NotWeights:
    """A class that a pickle would have to import."""


class TestRecogniser:
    def test_features(self):
        for n in (1600, 16_000, 16_079, 16_080):
            ours, lengths = reference_features()(sound(n)[None], torch.tensor([n]))
            expected = features_of_the_recipe(sound(n))
            assert ours.shape[1] == int(lengths) == len(expected)
            torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
    @pytest.mark.parametrize(("transducer", "ctc"), [(True, False), (False, True), (True, True)], ids=["transducer", "ctc", "both"])
    def test_greedy_text(self, tmp_path, causal, transducer, ctc):
        model = made(causal=causal, transducer=transducer, ctc=ctc)
        recogniser = load_reference_recogniser(write_folder(tmp_path, model))
        waveform = sound(40_000)
        text, found = text_by_hand(model, waveform, causal)
        heard = recogniser.transcribe(waveform, RATE)
        assert recogniser.causal == causal and heard.text == text and len(found) >= 5 and len({symbol for symbol, _ in found}) >= 3
        assert heard.words == tuple(Word(w, min(0.04 * a, 2.5), min(0.04 * (b + 1), 2.5)) for w, a, b in join_pieces(found, TOKENS))

    @pytest.mark.parametrize(
        ("name", "wrap", "tolerance"),
        [
            ("epoch-30.pt", lambda s: {"model": s, "model_avg": {k: v.double() for k, v in s.items()}, "optimizer": {"lr": [1, 2]}, "batch_idx_train": 7}, 0),
            ("pretrained.pt", lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, 0),
            ("pretrained.pt", lambda s: s, 0), ("model.safetensors", None, 0),
            ("pretrained.pt", lambda s: {"model": {k: v.half() for k, v in s.items()}}, 2**-11),
        ],
        ids=["training", "of several machines", "plain", "safetensors", "half precision"],
    )
    def test_kinds_of_files(self, tmp_path, name, wrap, tolerance):
        state = made(ctc=True).state_dict()
        recogniser = load_reference_recogniser(write_folder(tmp_path, state, name=name, wrap=wrap))
        for key, value in recogniser.model.state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, state[key], atol=1e-7 if tolerance else 0, rtol=tolerance)

    def test_parts_of_a_training_checkpoint(self, tmp_path):
        state = made().state_dict()
        write_folder(tmp_path, state, name="epoch-30.pt", wrap=lambda s: {"model": s, "model_avg": {k: 2 * v.double() for k, v in s.items()}})
        average = load_reference_recogniser(tmp_path, which="model_avg").model.state_dict()
        assert all(torch.equal(average[key], 2 * value) for key, value in state.items())
        write_folder(tmp_path, state, name="epoch-30.pt")
        with pytest.raises(CheckpointError, match="has no part 'model_avg'; its parts are model"):
            load_reference_recogniser(tmp_path, which="model_avg")

    def test_attention_decoder_is_left_out(self, tmp_path):
        model = make_asr_model("S", vocab_size=len(TOKENS), use_ctc=True, use_transducer=False, use_attention_decoder=True, **SMALL)
        recogniser = load_reference_recogniser(write_folder(tmp_path, model))
        assert recogniser.model.attention_decoder is None and recogniser.model.joiner is None

    def test_long_files_in_pieces(self, tmp_path):
        recogniser = load_reference_recogniser(write_folder(tmp_path / "m", made()))
        long = torch.cat([sound(16 * 16_000, seed=k) for k in range(3)])
        long[16 * 16_000 - 4000 : 16 * 16_000 + 4000] *= 0.001
        save(tmp_path / "long.wav", (0.5 * long).clamp(-1, 1), RATE)
        heard, texts, words = recogniser.transcribe_file(tmp_path / "long.wav"), [], []
        for start, piece in pieces(tmp_path / "long.wav", sample_rate=RATE):
            part = recogniser.transcribe(piece, RATE)
            texts.append(part.text)
            words += [Word(w.text, w.start + start, w.end + start) for w in part.words]
        assert len(texts) > 2 and heard.text == " ".join(texts) and heard.words == tuple(words) and words[-1].end > 40

    def test_nothing_to_hear(self, tmp_path):
        recogniser = ReferenceRecogniser(made(), TOKENS)
        for silent in (torch.zeros(8000), sound(1599), 1e-5 * sound(16_000)):
            assert recogniser.transcribe(silent, RATE).text == ""
        assert recogniser.transcribe(sound(1600), RATE).words is not None  # the shortest that gives a step
        with pytest.raises(ValueError, match="one pass takes at most 60 s"):
            recogniser.transcribe(torch.ones(61 * RATE), RATE)

    def test_special_symbols_are_never_written(self):
        assert ReferenceRecogniser(made(), TOKENS).never == (1, 2)
        assert ReferenceRecogniser(made(), ["<blk>", "a", "<0xE4>", "<", "<s>", "</s>", "<pad>", "x"]).never == (4, 5, 6)

    def test_characters_are_not_spaced(self, tmp_path):
        recogniser = load_reference_recogniser(write_folder(tmp_path, made(), tokens=["<blk>", "<sos/eos>", "<unk>", *"你好世界人"]))
        heard = recogniser.transcribe(sound(40_000), RATE)
        assert len(heard.text) == len(heard.words) >= 5 and set(heard.text) <= set("你好世界人")


class TestDamagedFiles:
    def folder(self, tmp_path):
        return write_folder(tmp_path, made())

    def test_pickle(self, tmp_path):
        folder = self.folder(tmp_path)
        torch.save({"model": made().state_dict(), "sampler": NotWeights()}, folder / "pretrained.pt")
        with pytest.raises(CheckpointError, match="cannot be read as weights.*ask for a pretrained.pt: opening such a file runs what its author put into it"):
            load_reference_recogniser(folder)

    @pytest.mark.parametrize("name", ["pretrained.pt", "model.safetensors"])
    def test_no_weights_at_all(self, tmp_path, name):
        folder = write_folder(tmp_path, made(), name=name)
        for content in (b"", b"hello", (folder / name).read_bytes()[:5000]):
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="cannot be read as weights"):
                load_reference_recogniser(folder)

    def test_nan_and_other_shapes(self, tmp_path):
        folder, state = self.folder(tmp_path), made().state_dict()
        torch.save({"model": state | {"joiner.output_linear.bias": torch.full((8,), math.nan)}}, folder / "pretrained.pt")
        with pytest.raises(CheckpointError, match="NaN or infinite numbers, first joiner.output_linear.bias"):
            load_reference_recogniser(folder)
        torch.save({"model": state | {"decoder.embedding.weight": torch.zeros(9, 512)}}, folder / "pretrained.pt")
        with pytest.raises(CheckpointError, match="do not fit the model.*decoder.embedding.weight"):
            load_reference_recogniser(folder)

    def test_symbols_of_another_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not fit the model, which has 8 symbols: number 7 is missing"):
            load_reference_recogniser(write_folder(tmp_path, made(), tokens=TOKENS[:-1]))


class TestCommand:
    def test_it_writes_the_text(self, tmp_path, capsys):
        model = made()
        folder = write_folder(tmp_path / "model", model)
        save(tmp_path / "said.wav", 0.5 * sound(40_000), RATE)
        code = main(["transcribe", "--reference", str(folder), str(tmp_path / "said.wav")])
        out, err = capsys.readouterr()
        from speechlearn.sound.waveform import load

        assert code == 0 and err == "" and out.strip() == text_by_hand(model, load(tmp_path / "said.wav", RATE), False)[0] != ""
        assert main(["transcribe", "--reference", str(folder), str(tmp_path / "said.wav"), "--json"]) == 0
        answer = json.loads(capsys.readouterr()[0])
        assert answer["text"] == out.strip() and [w["text"] for w in answer["words"]] == out.split()

    def test_it_says_what_is_wrong(self, tmp_path, capsys):
        assert main(["transcribe", "--reference", str(tmp_path), "x.wav"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "there is no file of weights" in err
        with pytest.raises(SystemExit) as stop:
            main(["transcribe", "--reference", str(tmp_path), "--checkpoint", "commands", "x.wav"])
        assert stop.value.code == 2
