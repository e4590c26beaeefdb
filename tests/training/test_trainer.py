"""`Trainer`: what it trains, what it writes, and what it says about bad input."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training_objects import Patterns, small, trainer, weights

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, TrainerSettings, UNet, load_pretrained
from fastddpm.training import DivergedError, ExponentialAverage, checkpoint, preview, read_log
from fastddpm.training.config import read_tables


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of the shared settings, done."""
    run = trainer(tmp_path_factory.mktemp("plain"))
    run.train()
    return run


def test_what_a_run_leaves(tmp_path: Path) -> None:
    run = trainer(tmp_path, metric=lambda run: {"step": float(run.step)}, metric_every=2, sample_every=3, keep_last=1)
    result = run.train()
    assert (result.step, result.metrics) == (6, {"step": 6.0})
    assert sorted(entry.name for entry in (tmp_path / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    assert run.checkpoints.steps() == [2, 6]  # the best and the last

    records = read_log(tmp_path / "log.jsonl")
    assert [(record["step"], "loss" in record) for record in records] == [
        (2, True), (2, False), (4, True), (4, False), (6, True), (6, False),
    ]  # fmt: skip
    last = records[-2]
    assert (last["loss"], last["epoch"]) == (result.loss, round(24 / 13, 4))
    assert 0 <= last["data_wait"] <= 1
    assert last["images_per_second"] > 0

    model, average = load_pretrained(tmp_path / "model"), run.averages[0].module
    for mine, theirs in zip(model.unet.parameters(), average.parameters(), strict=True):
        assert mine.equal(theirs)
    expected = run.sampler().sample(2, seed=1, class_labels=[0, 2])
    drawn = model.sampler(method="dpmsolver++", num_inference_steps=2).sample(2, seed=1, class_labels=[0, 2])
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    assert not load_pretrained(tmp_path / "model-best").unet.conv_in.weight.equal(model.unet.conv_in.weight)

    config = read_tables(tmp_path / "config.toml")
    assert config["trainer"]["train_lr"] == 1e-2
    assert config["model"]["block_out_channels"] == [8, 8]
    assert config["diffusion"]["beta_schedule"] == "squaredcos_cap_v2"

    diffusers = pytest.importorskip("diffusers")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model").unet
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([1, 3])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(x, t, class_labels=labels).sample, average(x, t, labels), rtol=1e-4, atol=1e-5
        )


def test_a_step_is_adamw_on_the_loss_of_the_diffusion(tmp_path: Path) -> None:
    """The run again, written out: torch's own optimizer, clipping and average, in float64."""
    data, diffusion = Patterns(), small(label_dropout=0.3, timestep_sampling="stratified").double()
    run = trainer(
        tmp_path, small(label_dropout=0.3, timestep_sampling="stratified"), adam_weight_decay=0.1, ema_decay=(0.5, 0.9),
        lr_warmup_steps=2, max_grad_norm=0.5, augment_horizontal_flip=True, gradient_accumulate_every=2,
    )  # fmt: skip
    run.train()
    optimizer = torch.optim.AdamW(diffusion.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.1)
    rates = [0.5, 1.0, *(0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4))]
    mean = weights(diffusion)
    whole = run.batches.__class__(13, 0, 8)
    for step, picks in enumerate(whole.picks(0, 6)):
        images = torch.stack([data[pick.image][0] for pick in picks]).double()
        labels = torch.tensor([pick.image % 3 for pick in picks])
        flips = whole.flips(step, 0)
        images[flips] = images[flips].flip(-1)
        diffusion(images, labels, step=step).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * rates[step]
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights(diffusion)
    torch.testing.assert_close(weights(run.diffusion).double(), weights(diffusion), rtol=1e-4, atol=1e-5)
    averaged = torch.cat([p.flatten() for p in run.averages[1].parameters()])
    torch.testing.assert_close(averaged.double(), mean, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model-ema-0.9").is_dir()


def test_samples_and_metrics_do_not_change_the_training(tmp_path: Path) -> None:
    def metric(run: Trainer) -> float:
        return float(run.sampler().sample(1, class_labels=0).mean() + torch.rand(()))

    def broken(run: Trainer) -> float:
        torch.rand(())
        raise RuntimeError("a bug in a metric")

    ends = []
    for name, chosen in (("none", None), ("draws", metric), ("broken", broken)):
        often = {} if chosen is None else {"metric": chosen, "metric_every": 1, "sample_every": 1, "save_every": 1}
        run = trainer(tmp_path / name, small(dropout=0.2), train_num_steps=3, **often)
        run.train()
        ends.append(weights(run.diffusion))
    assert ends[0].equal(ends[1])
    assert ends[0].equal(ends[2])


def test_bfloat16(tmp_path: Path, plain: Trainer) -> None:
    run = trainer(tmp_path, mixed_precision="bf16")
    run.train()
    assert run.accelerator.mixed_precision == "bf16"
    assert weights(run.diffusion).dtype == torch.float32
    assert 0 < (weights(run.diffusion) - weights(plain.diffusion)).abs().max() < 0.05
    after = trainer(tmp_path / "after", train_num_steps=1)
    assert after.accelerator.mixed_precision == "no"  # not what the run before was told


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_told_to_stop(tmp_path: Path, plain: Trainer, name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)

    def metric(run: Trainer) -> float:
        os.kill(os.getpid(), number)
        return 0.0

    run = trainer(tmp_path, metric=metric, metric_every=3)
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as stopped:
        run.train()
    if name == "SIGTERM":
        assert stopped.value.code == 0  # also of a script that would go on after the training
    assert run.step in (3, 4)
    assert run.checkpoints.latest() == run.step
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert signal.getsignal(number) is before
    with pytest.raises(ValueError, match=f"come to step {run.step}"):
        trainer(tmp_path)
    resumed = trainer(tmp_path, resume=True)
    assert resumed.step == run.step
    resumed.train()
    assert weights(resumed.diffusion).equal(weights(plain.diffusion))


def test_steps_without_a_finite_gradient(tmp_path: Path) -> None:
    # Two images are looked at first, then four a step: NaN from the fourth step on.
    constant: dict[str, Any] = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    run = trainer(tmp_path, data=Patterns(broken_from=14), max_bad_steps=3, save_every=2, **constant)
    with pytest.raises(DivergedError, match="for 3 steps in a row, from step 4 on; the checkpoint of step 4 "):
        run.train()
    before = trainer(tmp_path / "before", train_num_steps=3, **constant)
    before.train()
    assert weights(run.diffusion).equal(weights(before.diffusion))  # bad steps changed nothing
    assert bool(torch.cat([p.flatten() for p in run.averages[0].parameters()]).isfinite().all())


def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = checkpoint.save_file
    broken = {3}

    def save_file(tensors: Any, path: Path) -> None:
        if run.step in broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    run = trainer(tmp_path / "goes on", save_every=1)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.checkpoints.steps() == [4, 5, 6]
    assert "the checkpoint of step 3 cannot be written: [Errno 28] No space left on device" in caplog.text

    run = trainer(tmp_path / "stops", save_every=1, stop_on_save_error=True)
    with pytest.raises(OSError, match="the checkpoint of step 3 cannot be written"):
        run.train()
    assert run.checkpoints.latest() == 2
    broken.clear()
    assert trainer(tmp_path / "stops", save_every=1, resume=True).train().step == 6


def test_a_model_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """safetensors has an error of its own for a full disk; a run that goes on says it in one line."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(preview, "save_pretrained", save_pretrained)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="model cannot be written: I/O error: No "):
        trainer(tmp_path, save_every=3).train()
    (record,) = caplog.records
    assert record.getMessage().startswith("at step 3: OSError: ")
    assert not record.exc_info
    assert trainer(tmp_path, resume=True).step == 6


class Curves(nn.Module):
    """Any network: of curves [N, 2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


class Video(nn.Module):
    """As guided-diffusion's networks: `y` is a parameter also of one without classes."""

    num_classes = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        return self.conv(x)


@pytest.mark.parametrize(("network", "shape"), [(Curves, (2, 16)), (Video, (1, 3, 4, 4))])
def test_any_network_and_data_of_any_shape(tmp_path: Path, network: Any, shape: tuple[int, ...]) -> None:
    data = TensorDataset(torch.rand(20, *shape) * 2 - 1, torch.arange(20))
    run = trainer(tmp_path, GaussianDiffusion(network(), NoiseSchedule.linear(50)), data)
    before = weights(run.diffusion)
    run.train()
    assert not weights(run.diffusion).equal(before)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert f"The network was a {network.__name__}" in (tmp_path / "config.toml").read_text()
    assert trainer(tmp_path, GaussianDiffusion(network(), NoiseSchedule.linear(50)), data, resume=True).step == 6


def test_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's counter comes as a tensor; that the loss compiles without a break is `test_diffusion_backends`'."""
    data, real, ends = TensorDataset(torch.rand(20, 2, 16) * 2 - 1), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend="eager", fullgraph=True))
    for compiled in (False, True):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(Curves(), NoiseSchedule.linear(50))
        run = trainer(tmp_path / str(compiled), diffusion, data, compile=compiled, train_num_steps=2)
        run.train()
        ends.append(weights(run.diffusion))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def images(low: float, label: int | None = 0) -> TensorDataset:
    pictures = torch.full((4, 1, 8, 8), low)
    return TensorDataset(pictures) if label is None else TensorDataset(pictures, torch.tensor([0, label, 0, 0]))


def odd() -> GaussianDiffusion:
    config: Any = small(classes=False).unet.config
    return GaussianDiffusion(UNet(config, sample_size=9), NoiseSchedule.linear(9))


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ((small, Patterns(count=1)), {}, "data holds 1 image, "),
        ((small, Patterns(count=0)), {}, "data holds 0 images, "),
        ((small, Patterns(channels=3)), {}, r"\[3, 8, 8\], but the network is for \[1, 8, 8\]"),
        ((small, Patterns(size=16)), {}, r"\[1, 16, 16\], but the network"),
        ((small, images(200.0)), {}, r"values from 200 to 200, must be in \[-1, 1\]"),
        ((small, images(0.0, None)), {}, "data has no labels"),
        ((small, images(0.0, 9)), {}, "label 9, but the network knows 0 to 3"),
        ((odd, None), {}, "sample_size is 9, must be divisible by 2"),
        ((lambda: small(classes=False), None), {"guidance_scale": 2.0}, "guidance_scale is 2.0, must be None"),
        ((lambda: small().unet, None), {}, "diffusion is a UNet"),
        ((small, None), {"learning_rate": 1}, "learning_rate is no setting"),
        ((small, None), {"mixed_precision": "fp16", "device": "cpu"}, "mixed_precision is 'fp16', which needs CUDA"),
        ((small, None), {"train_batch_size": 0}, "train_batch_size .*positive integer"),
        ((small, None), {"train_lr": float("nan")}, "train_lr .*positive number"),
        ((small, None), {"lr_scheduler": "step"}, "lr_scheduler .*constant, linear, cosine"),
        ((small, None), {"ema_decay": (0.9, 1.0)}, "ema_decay .*below 1, or several"),
        ((small, None), {"ema_decay": (0.9, 0.9)}, "ema_decay .*differ"),
        ((small, None), {"max_grad_norm": 0}, "max_grad_norm .*or None"),
        ((small, None), {"num_workers": "all"}, "num_workers .*'auto'"),
        ((small, None), {"augment_horizontal_flip": 1}, "augment_horizontal_flip .*true or false"),
        ((small, None), {"mixed_precision": "fp8"}, "mixed_precision .*no, bf16, fp16"),
    ],
)
def test_bad_input(tmp_path: Path, made: tuple[Any, Any], settings: dict[str, Any], message: str) -> None:
    folder = tmp_path / "results"
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(folder, made[0](), made[1], **settings)
    assert not folder.exists()  # nothing was written


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "tensorboard is missing"),
        ("accelerate", {}, r"accelerate is missing, .* pip install fastddpm\[train\]"),
    ],
)
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        trainer(tmp_path / "results", **settings)
    assert not (tmp_path / "results").exists()


def test_learning_rates() -> None:
    settings = TrainerSettings(train_num_steps=100, lr_warmup_steps=10, lr_final=0.2)
    assert [settings.learning_rate(step) for step in (0, 4, 9, 10, 55, 100)] == pytest.approx(
        [0.1, 0.5, 1, 1, 0.6, 0.2]
    )
    assert settings.replace(lr_scheduler="linear").learning_rate(55) == pytest.approx(0.6)
    assert settings.replace(lr_scheduler="constant").learning_rate(99) == 1
    assert settings.replace(lr_warmup_steps=None).learning_rate(4) == 0.5  # a tenth of 100


def test_averages_forget_the_start() -> None:
    model = nn.Linear(1, 1)
    average = ExponentialAverage(model, 0.999)
    with torch.no_grad():
        for value, updates in ((1e6, 1), (1.0, 200)):
            for parameter in model.parameters():
                parameter.fill_(value)
            for _ in range(updates):
                average.update_parameters(model)
    assert float(average.module.weight) == pytest.approx(1, abs=1e-3)
    assert not average.train().training
