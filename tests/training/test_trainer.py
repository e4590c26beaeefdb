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
from training_objects import Patterns, small, trainer, weights

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, TrainerSettings, UNet, load_pretrained
from fastddpm.training import DivergedError, ExponentialAverage, checkpoint, preview, read_log
from fastddpm.training.config import read_tables


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
    assert last["loss"] == result.loss
    assert 0 <= last["data_wait"] <= 1
    assert last["images_per_second"] > 0
    assert last["epoch"] == round(24 / 13, 4)

    model = load_pretrained(tmp_path / "model")
    average = run.averages[0].module
    assert isinstance(average, UNet)
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


def test_diffusers_loads_the_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    run = trainer(tmp_path)
    run.train()
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model").unet
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([1, 3])
    with torch.no_grad():
        expected = run.averages[0].module(x, t, labels)
        torch.testing.assert_close(theirs(x, t, class_labels=labels).sample, expected, rtol=1e-4, atol=1e-5)


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


def test_it_learns(tmp_path: Path) -> None:
    trainer(tmp_path, train_num_steps=80, train_batch_size=16, log_every=20).train()
    losses = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_samples_and_metrics_do_not_change_the_training(tmp_path: Path) -> None:
    def metric(run: Trainer) -> float:
        return float(run.sampler().sample(1, class_labels=0).mean() + torch.rand(()))

    def broken(run: Trainer) -> float:
        torch.rand(())
        raise RuntimeError("a bug in a metric")

    ends = []
    for name, chosen in (("none", None), ("draws", metric), ("broken", broken)):
        often = {} if chosen is None else {"metric": chosen, "metric_every": 1, "sample_every": 1, "save_every": 1}
        run = trainer(tmp_path / name, small(dropout=0.2), **often)
        run.train()
        ends.append(weights(run.diffusion))
    assert ends[0].equal(ends[1])
    assert ends[0].equal(ends[2])


def test_bfloat16(tmp_path: Path) -> None:
    run = trainer(tmp_path, mixed_precision="bf16")
    run.train()
    assert run.accelerator.mixed_precision == "bf16"
    assert weights(run.diffusion).dtype == torch.float32
    exact = trainer(tmp_path / "exact")
    exact.train()
    assert exact.accelerator.mixed_precision == "no"  # not what the run before was told
    difference = (weights(run.diffusion) - weights(exact.diffusion)).abs().max()
    assert 0 < difference < 0.05


def test_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer(tmp_path / "plain", train_num_steps=2)
    plain.train()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend="aot_eager", fullgraph=True))
    compiled = trainer(tmp_path / "compiled", compile=True, train_num_steps=2)
    compiled.train()
    torch.testing.assert_close(weights(compiled.diffusion), weights(plain.diffusion), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_told_to_stop(tmp_path: Path, name: str) -> None:
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
    with pytest.raises(ValueError, match=f"where a run has come to step {run.step}: resume it, or choose another"):
        trainer(tmp_path)
    resumed = trainer(tmp_path, resume=True)
    assert resumed.step == run.step
    resumed.train()
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert weights(resumed.diffusion).equal(weights(whole.diffusion))


def test_steps_without_a_finite_gradient(tmp_path: Path) -> None:
    # Two images are looked at first, then four a step: NaN from the fourth step on.
    constant: dict[str, Any] = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    run = trainer(tmp_path, data=Patterns(broken_from=14), max_bad_steps=3, save_every=2, **constant)
    with pytest.raises(
        DivergedError, match="for 3 steps in a row, from step 4 on; the checkpoint of step 4 is as it was"
    ):
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


class Plain(nn.Module):
    """Any network: of curves [N, 2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


def test_any_network_and_data_of_any_shape(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.rand(20, 2, 16) * 2 - 1, torch.arange(20))
    run = trainer(tmp_path, GaussianDiffusion(Plain(), NoiseSchedule.linear(50)), data)
    before = weights(run.diffusion)
    run.train()
    assert not weights(run.diffusion).equal(before)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "The network was a Plain" in (tmp_path / "config.toml").read_text()
    assert trainer(tmp_path, GaussianDiffusion(Plain(), NoiseSchedule.linear(50)), data, resume=True).step == 6


class Video(nn.Module):
    """As guided-diffusion's networks: `y` is a parameter also of one without classes."""

    num_classes = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        return self.conv(x)


def test_three_dimensional_data_without_labels(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.rand(5, 1, 3, 4, 4) * 2 - 1)
    assert trainer(tmp_path, GaussianDiffusion(Video(), NoiseSchedule.linear(50)), data).train().step == 6


def bad(
    folder: Path, message: str, diffusion: GaussianDiffusion | None = None, data: Any = None, **settings: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(folder, diffusion, data, **settings)
    assert not folder.exists()  # nothing was written


def test_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    bad(folder, "data holds 1 image, must hold at least 2", data=Patterns(count=1))
    bad(folder, "data holds 0 images, must hold at least 2", data=Patterns(count=0))
    bad(folder, r"images of \[3, 8, 8\], but the network is for \[1, 8, 8\]", data=Patterns(channels=3))
    bad(folder, r"images of \[1, 16, 16\], but the network", data=Patterns(size=16))
    values = torch.utils.data.TensorDataset(torch.full((4, 1, 8, 8), 200.0), torch.zeros(4, dtype=torch.int64))
    bad(folder, r"values from 200 to 200, must be in \[-1, 1\], or uint8", data=values)
    unlabelled = torch.utils.data.TensorDataset(torch.zeros(4, 1, 8, 8))
    bad(folder, "data has no labels, but the network has classes", data=unlabelled)
    wrong = torch.utils.data.TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 9, 0, 0]))
    bad(folder, "data has the label 9, but the network knows 0 to 3", data=wrong)
    odd = GaussianDiffusion(UNet(small(classes=False).unet.config, sample_size=9), NoiseSchedule.linear(9))  # type: ignore[arg-type]
    bad(folder, "sample_size is 9, must be divisible by 2: the U-Net halves it 1 times", odd)
    unguided = small(classes=False)
    bad(folder, "guidance_scale is 2.0, must be None: the network has no null_class", unguided, guidance_scale=2.0)
    with pytest.raises(TypeError, match="diffusion is a UNet, must be a GaussianDiffusion"):
        trainer(folder, small().unet)  # type: ignore[arg-type]
    bad(folder, "learning_rate is no setting of a Trainer, which are: results_folder, ", learning_rate=1)
    if not torch.cuda.is_available():
        bad(folder, "mixed_precision is 'fp16', which needs CUDA", mixed_precision="fp16")


def test_without_tensorboard_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard is missing"):
        trainer(tmp_path / "results", tensorboard=True)
    assert not (tmp_path / "results").exists()


def test_without_accelerate_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"accelerate is missing, .* pip install fastddpm\[train\]"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train_batch_size", 0, "must be a positive integer"),
        ("train_lr", float("nan"), "must be a positive number"),
        ("lr_scheduler", "step", "must be one of constant, linear, cosine"),
        ("ema_decay", (0.9, 1.0), "must be a number from 0 to below 1, or several"),
        ("ema_decay", (0.9, 0.9), "must be numbers that differ"),
        ("max_grad_norm", 0, "must be a positive number or None"),
        ("num_workers", "all", "must be 'auto' or at least 0"),
        ("augment_horizontal_flip", 1, "must be true or false"),
        ("mixed_precision", "fp8", "must be None or one of no, bf16, fp16"),
    ],
)
def test_settings_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*{message}"):
        TrainerSettings(**{field: value})


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
        for parameter in model.parameters():
            parameter.fill_(1e6)
        average.update_parameters(model)
        for parameter in model.parameters():
            parameter.fill_(1.0)
        for _ in range(200):
            average.update_parameters(model)
    assert float(average.module.weight) == pytest.approx(1, abs=1e-3)
    assert not average.train().training
