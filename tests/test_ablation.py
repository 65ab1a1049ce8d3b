"""The ablation: each change does what its name says, and nothing else."""
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zipformer_tools import frames, randn, shaken

from speechlearn.ablation import ABLATION, CHANGES, OwnWeights, ablate, compare, exchange, measure, own_weights, plot_ablation, student_t
from speechlearn.ablation import use_layer_norm, use_swish, use_swoosh_r, without_balancer, without_bypass, without_convolution, without_nonlin_attention, without_whiten
from speechlearn.cli import main
from speechlearn.recipes import Recipe, make_model, schedule_of
from speechlearn.zipformer.activations import ActivationDropoutAndLinear, SwooshL, SwooshR
from speechlearn.zipformer.attention import CompactRelPositionalEncoding
from speechlearn.zipformer.balancer import Balancer
from speechlearn.zipformer.layer import Zipformer2EncoderLayer
from speechlearn.zipformer.normalisation import BiasNorm
from speechlearn.zipformer.recogniser import ZipformerRecogniser, small_config
from speechlearn.zipformer.whitening import Whiten


def layer(seed=0):
    torch.manual_seed(seed)
    made = Zipformer2EncoderLayer(embed_dim=12, pos_dim=8, num_heads=2, query_head_dim=4, pos_head_dim=2, value_head_dim=4, feedforward_dim=24, cnn_module_kernel=5)
    return shaken(made).eval()


def run(one, x):
    positions = CompactRelPositionalEncoding(8, 0.0)(x)
    return one(x, positions.to(x.dtype))


def kinds(model):
    return {type(module) for module in model.modules()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ZipformerRecogniser(small_config("tiny", 20, n_bins=20))


@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change.model])
def test_every_changed_model_learns(name, model):
    """Forward and backward reach the front end, in training and with finite numbers."""
    changed = copy.deepcopy(model)
    CHANGES[name].model(changed)
    x, lengths = randn(2, 60, 20, dtype=torch.float32), torch.tensor([60, 45])
    before = {k: v.clone() for k, v in changed.state_dict().items()}
    changed.train()
    losses = changed.model(x, lengths, torch.tensor([[5, 6, 7], [8, 9, 9]]), torch.tensor([3, 2]))
    losses.ctc.backward()
    gradient = changed.model.encoder_embed.conv[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert before.keys() == changed.state_dict().keys()


class TestChangedLayers:
    def test_own_weights_begin_as_the_shared_ones(self):
        """With equal parameters, three sets of weights are three times the same set."""
        shared = layer()
        own = copy.deepcopy(shared)
        own_weights(own)
        x = frames(9, batch=2)
        torch.testing.assert_close(run(own, x), run(shared, x), rtol=0, atol=0)

    def test_own_weights_are_really_own(self):
        own = layer()
        own_weights(own)
        x = frames(9)
        before = run(own, x)
        with torch.no_grad():
            own.self_attn2.own.in_proj.weight.mul_(-3)
        assert (run(own, x) - before).abs().max() > 1e-6
        n = sum(p.numel() for p in layer().self_attn_weights.parameters())
        assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in layer().parameters()) + 3 * n

    def test_own_weights_follow_the_padding(self):
        own = layer()
        own_weights(own)
        x = frames(9, batch=2)
        positions = CompactRelPositionalEncoding(8, 0.0)(x).double()
        padding = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
        whole = own(x, positions, src_key_padding_mask=padding)
        short = x[:6, 1:]
        alone = own(short, CompactRelPositionalEncoding(8, 0.0)(short).double())
        torch.testing.assert_close(whole[:6, 1:], alone)

    def test_swish_is_silu(self):
        linear = ActivationDropoutAndLinear(6, 4, activation="SwooshL").double()
        holder = nn.ModuleDict({"a": SwooshL(), "b": linear})
        use_swish(holder)
        x = randn(5, 6)
        assert torch.equal(holder["a"](x), F.silu(x))
        torch.testing.assert_close(holder["b"](x), F.linear(F.silu(x), linear.weight, linear.bias))

    def test_swish_keeps_the_dropout(self):
        """The same draw gives the same mask, shared along the same axis, scaled in the same way."""
        linear = ActivationDropoutAndLinear(6, 6, bias=False, activation="SwooshL", dropout_p=0.5, dropout_shared_dim=0).double()
        with torch.no_grad():
            linear.weight.copy_(torch.eye(6))
        holder = nn.ModuleDict({"a": linear, "b": SwooshL()})
        x = randn(7, 3, 6) + 2.0
        torch.manual_seed(3)
        expected = linear(x) == 0
        use_swish(holder)
        torch.manual_seed(3)
        y = holder["a"](x)
        assert torch.equal(y == 0, expected) and 0 < int(expected.sum()) < expected.numel()
        torch.testing.assert_close(y[~expected], 2 * F.silu(x)[~expected])

    def test_swoosh_r_everywhere(self):
        changed = layer()
        with_l = {m.activation for m in changed.modules() if isinstance(m, ActivationDropoutAndLinear)}
        assert with_l == {"SwooshL", "SwooshR"}
        front = nn.Sequential(SwooshL())
        holder = nn.ModuleDict({"layer": changed, "front": front})
        use_swoosh_r(holder)
        assert {m.activation for m in changed.modules() if isinstance(m, ActivationDropoutAndLinear)} == {"SwooshR"} and type(holder["front"][0]) is SwooshR

    def test_without_bypass_is_a_bypass_of_one(self):
        ordinary = layer()
        straight = copy.deepcopy(ordinary)
        without_bypass(nn.ModuleList([straight]))
        with torch.no_grad():
            ordinary.bypass.bypass_scale.fill_(1.0)
            ordinary.bypass_mid.bypass_scale.fill_(1.0)
        x = frames(9)
        torch.testing.assert_close(run(straight, x), run(ordinary, x))

    @pytest.mark.parametrize(
        "change, part", [(without_nonlin_attention, "nonlin_attention"), (without_convolution, "conv_module1"), (without_convolution, "conv_module2")]
    )
    def test_without_a_module_is_one_that_adds_nothing(self, change, part):
        ordinary = layer()
        without = copy.deepcopy(ordinary)
        change(nn.ModuleList([without]))
        for name in ("nonlin_attention",) if change is without_nonlin_attention else ("conv_module1", "conv_module2"):
            with torch.no_grad():
                getattr(ordinary, name).out_proj.weight.zero_()
                getattr(ordinary, name).out_proj.bias.zero_()
        x = frames(9)
        torch.testing.assert_close(run(without, x), run(ordinary, x))
        assert not list(getattr(without, part).parameters())

    def test_balancers_and_whiteners_change_only_gradients(self):
        ordinary, x = layer(), frames(9)
        for change, gone in ((without_balancer, Balancer), (without_whiten, Whiten)):
            without = copy.deepcopy(ordinary)
            change(nn.ModuleList([without]))
            assert gone not in kinds(without)
            assert torch.equal(run(without, x), run(ordinary, x))

    def test_layer_norm(self):
        changed = layer()
        use_layer_norm(nn.ModuleList([changed]))
        assert BiasNorm not in kinds(changed) and isinstance(changed.norm, nn.LayerNorm) and changed.norm.normalized_shape == (12,)

    def test_all_at_one_rate(self):
        from speechlearn.recipes import make_model

        one, _ = make_model(Recipe(model="zipformer", size="tiny", vocabulary="words", n_bins=20), CHANGES["one-rate"].sizes)
        assert one.model.encoder.downsampling_factor == (2, 2, 2)

    def test_a_change_that_changes_nothing_is_refused(self):
        with pytest.raises(ValueError, match="no Whiten to exchange"):
            exchange(nn.Sequential(nn.Linear(2, 2)), Whiten, lambda old: nn.Identity())


class TestMeasuring:
    RECIPE = Recipe(
        model="zipformer", size="tiny", corpus="tiny", utterances=24, vocabulary="letters", n_bins=20, augment=False, steps=2, validate_every=1, max_frames=1500, schedule_steps=1, threads=1,
        optimiser="scaled-adam", learning_rate=0.05, schedule="eden",
    )

    def test_a_measurement(self):
        measured = measure("layer-norm", self.RECIPE, n_test=2)
        assert 0 <= measured["wer"] and measured["seconds_per_step"] > 0 and measured["peak_mib"] > 100 and len(measured["curve"]) == 2
        plain, _ = make_model(self.RECIPE)
        extra = sum(2 * m.num_channels - m.num_channels - 1 for m in plain.modules() if isinstance(m, BiasNorm))  # gain and bias, in place of a bias and one scale
        assert measured["parameters"] == sum(p.numel() for p in plain.parameters()) + extra

    def test_interrupted_work_is_kept(self, tmp_path, monkeypatch):
        """What a file holds is not measured again; a failure loses nothing and is told."""
        path, asked = tmp_path / "ablation.json", []

        class Child:
            exitcode = 1

            def __init__(self, target, args):
                self.args = args

            def start(self):
                name, recipe, n_test, queue = self.args
                asked.append((name, recipe.seed))
                queue.append({"wer": 0.2 + 0.1 * (name == "swish") + 0.01 * recipe.seed, "parameters": 7, "seconds_per_step": 1.0, "peak_mib": 100} if name != "noam" else {"failed": "ValueError: no"})

            def join(self):
                pass

            def is_alive(self):
                return False

        class Queue(list):
            def get(self, timeout):
                return self.pop()

        context = type("Context", (), {"Process": Child, "Queue": Queue})
        monkeypatch.setattr("speechlearn.ablation.multiprocessing.get_context", lambda kind: context)
        ablate(["swish"], [0], self.RECIPE, path, progress=lambda line: None)
        assert asked == [("none", 0), ("swish", 0)]
        with pytest.raises(RuntimeError, match="'noam' failed: ValueError: no"):
            ablate(["swish", "noam"], [0, 1], self.RECIPE, path, progress=lambda line: None)
        assert asked == [("none", 0), ("swish", 0), ("noam", 0)]
        results = ablate(["swish"], [0, 1], self.RECIPE, path, progress=lambda line: None)
        assert asked[3:] == [("none", 1), ("swish", 1)] and json.loads(path.read_text()) == results
        row = compare(results)[0]
        assert (row.name, row.n) == ("swish", 2) and row.difference == pytest.approx(0.1) and row.error == pytest.approx(0.0, abs=1e-12)
        with pytest.raises(ValueError, match="another recipe.*steps differ"):
            ablate(["swish"], [0], Recipe(**{**self.RECIPE.__dict__, "steps": 3}), path)
        with pytest.raises(ValueError, match="Did you mean 'swish'"):
            ablate(["swihs"], [0], self.RECIPE, path)

    def test_a_child_that_dies_is_told(self, tmp_path):
        """A real process, and one that cannot work: its corpus does not exist."""
        with pytest.raises(RuntimeError, match="the run 'none' failed: .*no-such"):
            ablate([], [0], Recipe(**{**self.RECIPE.__dict__, "corpus": "no-such"}), tmp_path / "a.json", progress=lambda line: None)
        assert not (tmp_path / "a.json").exists()

    def test_comparison_by_hand(self):
        runs = lambda *wers: {str(i): {"wer": wer, "parameters": 5, "seconds_per_step": 2.0 * (1 + (wers[0] > 0.15)), "peak_mib": 100} for i, wer in enumerate(wers)}
        rows = compare({"runs": {"none": runs(0.10, 0.12, 0.11), "swish": runs(0.20, 0.21, 0.22), "noam": runs(0.11, 0.10)}})
        assert [row.name for row in rows] == ["swish", "none", "noam"]
        swish, none, noam = rows
        assert swish.difference == pytest.approx((0.10 + 0.09 + 0.11) / 3) and swish.error == pytest.approx(0.01 / math.sqrt(3)) and swish.clear and swish.time == 2.0 and swish.paper == 0.58
        assert noam.n == 2 and noam.difference == pytest.approx((0.01 - 0.02) / 2) and not noam.clear and none.difference == 0
        figure = plot_ablation(rows)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [CHANGES["noam"].what, CHANGES["swish"].what]

    @pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 10, 15, 30, 100])
    def test_student_t_against_a_simulation_free_source(self, freedom):
        """The interval of Student's t, by integrating its density."""
        x = torch.linspace(0, student_t(freedom), 200_001, dtype=torch.float64)
        log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        density = torch.exp(log_c - (freedom + 1) / 2 * torch.log1p(x**2 / freedom))
        assert 2 * float(torch.trapezoid(density, x)) == pytest.approx(0.95, abs=2e-3)


class TestSchedule:
    def test_eden_goes_through_its_curve(self):
        """Any length of run ends at the same factor: both falls, of batches and of epochs."""
        for steps in (100, 1000):
            schedule = schedule_of(Recipe(model="zipformer", schedule="eden", steps=steps, warmup_steps=10))
            end = (17.3**2 + 1) ** -0.25 * ((50 / 3.5) ** 2 + 1) ** -0.25
            assert schedule(steps, 1.0) == pytest.approx(end) and schedule(0, 0.0) == pytest.approx(0.1)

    def test_others_are_names(self):
        assert schedule_of(Recipe(schedule="noam")) == "noam"
        with pytest.raises(ValueError, match="choose cosine, eden"):
            Recipe(schedule="edne")


class TestCommand:
    def test_list(self, capsys):
        assert main(["ablate", "--list"]) == 0
        out = capsys.readouterr().out
        assert all(name in out and change.what in out for name, change in CHANGES.items())

    def test_wrong_input(self, capsys, tmp_path):
        assert main(["ablate", "--seeds", "a,b", "--results", str(tmp_path / "x.json")]) == 1
        assert "whole numbers" in capsys.readouterr().err
        assert main(["ablate", "swihs", "--results", str(tmp_path / "x.json")]) == 1
        assert "Did you mean 'swish'" in capsys.readouterr().err

    def test_stored_results_are_of_this_recipe(self, tmp_path):
        """They can be continued: what is there is not trained again, though the recipe has got settings since."""
        import shutil
        from pathlib import Path

        path = Path(__file__).parent.parent / "benchmarks" / "results" / "ablation.json"
        stored = json.loads(path.read_text())
        shutil.copy(path, tmp_path / "copy.json")
        assert ablate(["adamw", "swish"], [0, 1, 2], ABLATION, tmp_path / "copy.json", progress=pytest.fail)["runs"] == stored["runs"]
        with pytest.raises(ValueError, match="steps differ"):
            ablate(["adamw"], [0], replace(ABLATION, steps=301), tmp_path / "copy.json", progress=pytest.fail)
        assert stored["recipe"].keys() <= ABLATION.__dict__.keys()
        assert set(stored["runs"]) <= set(CHANGES) and all(set(runs) <= set(stored["runs"]["none"]) for runs in stored["runs"].values()), "each run needs one of the same seed without a change"
        assert len(stored["runs"]["none"]) >= 2 and all(0 <= run["wer"] < 2 and run["curve"][-1][0] == ABLATION.steps for runs in stored["runs"].values() for run in runs.values())
