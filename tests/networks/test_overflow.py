"""How large activations get, and whether float16 holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import unets
from torch import Tensor, nn

from fastddpm.networks import overflow
from fastddpm.networks.overflow import OverflowReport, activation_ranges, choose_half, fp16_overflow
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule

SMALL: dict[str, Any] = unets.SMALL | {"block_out_channels": (16, 32), "attention_head_dim": None}
SCHEDULE = NoiseSchedule.linear()


def small_unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes}).eval()


class Gain(nn.Module):
    """Multiplies by a number, times (1 + t / 1000)."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.clamp(-1, 1) * self.gain * (1 + t / 1000).to(x.dtype).view(-1, 1, 1, 1)


class Loud(nn.Module):
    """A model that gets loud inside, most at the last timestep, and returns what it was given."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.loud, self.quiet = Gain(gain), nn.Conv2d(1, 1, 1)
        self.gain = gain
        self.seen: list[tuple[torch.dtype, int]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, int(t[0])))
        return self.loud(x, t) / self.gain + 0 * self.quiet(x)


@pytest.mark.parametrize(
    ("changes", "norms_but_the_last"),
    [({}, 20), ({"resnet_time_scale_shift": "scale_shift"}, 19), ({"num_class_embeds": 4}, 20)],
)
@torch.no_grad()
def test_ranges_equal_those_of_diffusers(changes: dict[str, Any], norms_but_the_last: int) -> None:
    """There every norm is a module of its own, whose input a hook sees; here they are fused, their inputs derived."""
    diffusers = pytest.importorskip("diffusers")
    ours = small_unet(**changes)
    theirs = diffusers.UNet2DModel(**{**SMALL, **changes}).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t = 3 * torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    labels = torch.tensor([0, 3]) if "num_class_embeds" in changes else None
    found, expected = activation_ranges(ours, x, t, labels), activation_ranges(theirs, x, t, labels)
    norms = {name for name in expected if name.startswith("input of") and "conv_norm_out" not in name}
    assert len(norms) == norms_but_the_last
    assert norms == {name for name in found if name.startswith("input of")}
    same = (set(found) & set(expected)) - {name for name in expected if name.split(".")[-1].startswith("norm")}
    assert {"conv_in", "conv_out", "output", "mid_block.resnets.0.conv1", "mid_block.attentions.0"} <= same
    for name in same | norms:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@torch.no_grad()
def test_ranges_are_maxima() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Tanh())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor, t: Tensor) -> dict[str, Any]:
            return self.layers(x)

    x = torch.randn(3, 1, 4, 4)
    found = activation_ranges(Model(), x, torch.zeros(3, dtype=torch.int64))
    convolved = model[0](x)
    expected = {
        "layers.0": convolved.abs().max(),
        "input of layers.1": convolved.abs().max(),
        "layers.1": model[1](convolved).abs().max(),
        "layers.2": model(x).abs().max(),
        "layers": model(x).abs().max(),
        "output": model(x).abs().max(),
    }
    assert found == {name: pytest.approx(value.item()) for name, value in expected.items()}


def test_ranges_leave_no_trace() -> None:
    unet = small_unet().train()
    activation_ranges(unet, torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert unet.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_values_that_are_no_numbers_are_infinite() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * float("nan")

    assert activation_ranges(Broken(), torch.ones(1, 1), torch.tensor([5])) == {"output": float("inf")}


def test_ranges_are_of_float32_modules() -> None:
    with pytest.raises(ValueError, match="unet has parameters in torch.float16, must be in torch.float32"):
        activation_ranges(small_unet().half(), torch.randn(1, 3, 8, 8), torch.tensor([5]))
    with pytest.raises(TypeError, match="unet is a function, must be an nn.Module"):
        activation_ranges(lambda x, t: x, torch.randn(1, 3, 8, 8), torch.tensor([5]))  # type: ignore[arg-type]


# -- float16 ----------------------------------------------------------------------------------------------------------


def test_finds_where_float16_ends() -> None:
    model = Loud(50_000)  # 1.999 times that at the last timestep
    report = fp16_overflow(model, SCHEDULE, shape=(1, 8, 8), num_timesteps=4)
    assert model.seen == [(torch.float32, t) for t in (999, 666, 333, 0)]  # itself: it is in float32 already
    assert (report.module, report.timestep) == ("loud", 999)
    assert report.maximum == pytest.approx(50_000 * 1.999)
    assert report.nonfinite_at == 999
    assert report.overflows
    assert not report.fits
    assert "loud reaches 9.995e+04 at timestep 999, past float16's end of 65504" in str(report)
    assert "in float16 the output at timestep 999 is not finite" in str(report)


def test_runs_a_copy_in_float16() -> None:
    model = Loud(2.0)
    runs: list[torch.dtype] = []
    model.quiet.register_forward_pre_hook(lambda module, args: runs.append(args[0].dtype))
    assert fp16_overflow(model, SCHEDULE, shape=(1, 8, 8), num_timesteps=2).fits
    assert runs == [torch.float32, torch.float16] * 2
    assert model.quiet.weight.dtype == torch.float32


def test_near_the_end_is_not_safe() -> None:
    report = fp16_overflow(Loud(20_000), SCHEDULE, shape=(1, 8, 8))
    assert report.nonfinite_at is None
    assert not report.overflows
    assert report.headroom == pytest.approx(65504 / (20_000 * 1.999))
    assert not report.fits
    assert OverflowReport(32752.0, "conv", 0).fits
    assert not OverflowReport(32753.0, "conv", 0).fits


def test_chooses_float16_where_it_fits() -> None:
    dtype, reason = choose_half(Loud(10_000), SCHEDULE, shape=(1, 8, 8))
    assert dtype == torch.float16
    assert reason == ("float16: loud reaches 1.999e+04 at timestep 999, 3.28 times below float16's end of 65504")


def test_chooses_bfloat16_where_it_does_not() -> None:
    dtype, reason = choose_half(Loud(50_000), SCHEDULE, shape=(1, 8, 8))
    assert dtype == torch.bfloat16
    assert reason.startswith("bfloat16: loud reaches 9.995e+04 at timestep 999, past float16's end")


def test_chooses_float32_on_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overflow, "fp16_overflow", lambda *_, **__: OverflowReport(1e6, "conv", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_half(Loud(1), SCHEDULE, device="cuda")[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_half(Loud(1), SCHEDULE, device="cuda")[0] == torch.bfloat16


def test_weights_too_large_for_float16_are_seen() -> None:
    """Activations that all fit do not help where a weight is infinite."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1e5))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.weight / 1e5

    report = fp16_overflow(Weight(), SCHEDULE, shape=(1, 4, 4))
    assert report.maximum < 10
    assert report.nonfinite_at == 999
    assert not report.fits


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_states_are_those_of_sampling(prediction_type: str) -> None:
    """A model that knows the truth is shown x_t = sqrt(abar) x_0 + sqrt(1 - abar) z with its own x_0."""
    levels = SCHEDULE.alphas_cumprod
    truth = torch.tensor([[-0.5, 0.25], [0.75, -1.0]])
    seen: dict[int, Tensor] = {}

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        bar = levels[t].float().view(-1, 1, 1, 1)
        if x.dtype == torch.float32:
            seen[int(t[0])] = x
        eps = (x - bar.sqrt() * truth) / (1 - bar).sqrt()
        if prediction_type == "sample":
            return truth.expand_as(x).to(x.dtype)
        v = bar.sqrt() * eps - (1 - bar).sqrt() * truth
        return (eps if prediction_type == "epsilon" else v).to(x.dtype)

    fp16_overflow(oracle, SCHEDULE, shape=(1, 2, 2), prediction_type=prediction_type, num_samples=500, num_timesteps=3)
    assert list(seen) == [999, 500, 0]  # 499.5 rounds to even
    for t, signal in ((999, 0.0), (500, 1.0), (0, 1.0)):
        bar = float(levels[t])
        mean, std = seen[t].mean(0)[0], (1 - bar) ** 0.5
        torch.testing.assert_close(mean, signal * bar**0.5 * truth, atol=5 * std / 500**0.5 + 1e-3, rtol=0)
        assert float(seen[t].std(0).mean()) == pytest.approx(std, rel=0.1)


def test_unbounded_states_stay_of_unit_size() -> None:
    """At pure noise x_0 of an untrained model is off by orders of magnitude, which the states must not follow."""
    seen: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(x.abs().max()))
        return torch.zeros_like(x)

    report = fp16_overflow(model, NoiseSchedule.cosine(), shape=(1, 4, 4), clip_range=None)
    assert max(seen) < 10
    assert report.module == "output"
    assert report.headroom == float("inf")
    assert report.fits


def test_every_kind_of_model() -> None:
    """Classes, learned variance, further channels, and pure noise at the end of the schedule."""
    unet = small_unet(num_class_embeds=5, in_channels=5, out_channels=6)
    seen: list[Tensor] = []
    unet.class_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    report = fp16_overflow(unet, schedule, learned_variance=True, num_samples=7, num_timesteps=2)
    assert report.fits
    assert report.timestep <= 998  # epsilon says nothing at 999
    assert seen[0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    labels = torch.full((2,), 3)
    fp16_overflow(unet, schedule, learned_variance=True, class_labels=labels, num_timesteps=1)
    assert seen[-1].tolist() == [3, 3]
    assert unet.dtype == torch.float32


def test_says_what_is_wrong() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return x / 0

    with pytest.raises(ValueError, match="model returned values that are not finite at timestep 999, in float32"):
        fp16_overflow(broken, SCHEDULE, shape=(1, 4, 4))
    with pytest.raises(ValueError, match="shape is None, must be given"):
        fp16_overflow(broken, SCHEDULE)
    with pytest.raises(ValueError, match="num_timesteps is 0"):
        fp16_overflow(broken, SCHEDULE, shape=(1, 4, 4), num_timesteps=0)
    with pytest.raises(ValueError, match="class_labels has 9, every label must be from 0 to 4"):
        fp16_overflow(small_unet(num_class_embeds=5), SCHEDULE, class_labels=torch.tensor([0, 9]))


@pytest.mark.parametrize("changes", [{"sample_size": None}, {"class_embed_type": "timestep"}])
def test_auto_tries_every_unet(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose config names no size, or whose labels are read as timesteps."""
    monkeypatch.setattr(overflow, "usable_device", torch.device)
    tried: list[tuple[int, ...]] = []

    def on_the_cpu(model: UNet, schedule: NoiseSchedule, *, device: torch.device, **options: Any) -> tuple:
        model.register_forward_pre_hook(lambda _, args: tried.append(tuple(args[0].shape[1:])))
        return choose_half(model, schedule, num_timesteps=1, **options)

    monkeypatch.setattr(overflow, "choose_half", on_the_cpu)
    options = {"prediction_type": "epsilon", "clip_range": 1.0, "learned_variance": False}
    assert overflow.choose_dtype(small_unet(**changes), SCHEDULE, "auto", "cuda", **options) == (torch.float16, None)
    size = 32 if "sample_size" in changes else 8
    assert set(tried) == {(3, size, size)}
