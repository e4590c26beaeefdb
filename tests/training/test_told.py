"""What a run was told is in what it saves: in its config, in its checkpoints, in its model."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_objects import Patterns, small, trainer

from fastddpm import GaussianDiffusion, NoiseSchedule, TrainerSettings, UNet, load_pretrained, save_pretrained
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.training.config import RunConfig, read_tables, to_toml, write_run_config
from fastddpm.training.data import open_data
from fastddpm.training.defaults import look_at
from fastddpm.training.state import MEANING, OBJECTIVE, OF_THE_ORDER, WITHOUT_EFFECT, compare, describe

# Another value of every setting that a diffusion and a trainer have.
OTHER: dict[str, Any] = {
    "prediction_type": "v_prediction", "variance_type": "fixed_large", "loss": "huber", "huber_delta": 0.3,
    "vlb_weight": 0.5, "weighting": "p2", "min_snr_gamma": 3.0, "p2_gamma": 0.5, "p2_k": 2.0, "offset_noise": 0.1,
    "input_perturbation": 0.2, "immiscible": True, "label_dropout": 0.2, "null_class": 2,
    "timestep_sampling": "stratified", "self_condition": True, "clip_sample": False, "seed": 5, "backend": "eager",
}  # fmt: skip
OTHER_RUN: dict[str, Any] = {
    "results_folder": "elsewhere", "train_batch_size": 2, "gradient_accumulate_every": 3, "train_num_steps": 9,
    "train_lr": 1e-3, "lr_scheduler": "linear", "lr_warmup_steps": 1, "lr_final": 0.5, "adam_betas": (0.8, 0.9),
    "adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "max_grad_norm": None, "mixed_precision": "bf16",
    "ema_decay": (0.9, 0.5), "ema_warmup": False, "augment_horizontal_flip": True, "seed": 7, "num_workers": 1,
    "cache_bytes": 5, "log_every": 9, "save_every": 9, "sample_every": 9, "metric_every": 9, "metric_mode": "max",
    "num_samples": 9, "num_inference_steps": 9, "guidance_scale": 2.0, "keep_last": 9, "max_bad_steps": 9,
    "stop_on_save_error": True, "compile": True, "channels_last": False, "device": "cpu", "tensorboard": False,
}  # fmt: skip


def network(**fields: Any) -> UNet:
    config: Any = small().unet.config
    return UNet(config, **fields)


def diffusion(schedule: NoiseSchedule | None = None, **settings: Any) -> GaussianDiffusion:
    channels = 2 if settings.get("self_condition") else 1
    return GaussianDiffusion(network(in_channels=channels), schedule or NoiseSchedule.cosine(50), **settings)


def test_every_setting_has_another_value_here() -> None:
    assert OTHER.keys() == OBJECTIVE.keys()
    assert OTHER_RUN.keys() == {field.name for field in dataclasses.fields(TrainerSettings)}
    assert all(OTHER[name] != default for name, default in OBJECTIVE.items())


def test_a_run_comes_back_from_its_config(tmp_path: Path) -> None:
    """All settings of the diffusion, the schedule, the network and the trainer at once, through the file."""
    settings = {**OTHER, "self_condition": True}
    for schedule in (
        NoiseSchedule.sigmoid(40), NoiseSchedule.linear(40).rescale_zero_terminal_snr(),
        NoiseSchedule.from_betas([0.1, 0.2]), NoiseSchedule.linear(40, 0.01, 0.3),
    ):  # fmt: skip
        made = diffusion(schedule, **settings)
        data = torch.utils.data.TensorDataset(torch.zeros(4, 1, 8, 8) - 1, torch.zeros(4, dtype=torch.int64))
        fields = {**OTHER_RUN, "results_folder": str(tmp_path), "compile": False, "gradient_accumulate_every": 1}
        run = trainer(tmp_path, made, data, **fields)
        write_run_config(tmp_path / "config.toml", run)
        config = RunConfig.from_tables(read_tables(tmp_path / "config.toml"))
        again = config.build()
        expected = describe(made, run.settings, run.accelerator.mixed_precision)
        assert describe(again, config.trainer, "bf16") == expected
        assert torch.equal(again.schedule.betas, made.schedule.betas)
        assert (again.backend, config.trainer) == ("eager", run.settings)


def told(made: GaussianDiffusion, **fields: Any) -> dict[str, Any]:
    settings = TrainerSettings(**fields)
    return describe(made, settings, settings.mixed_precision or "no")


@pytest.mark.parametrize("name", [name for name in OTHER if name != "backend"])
def test_another_setting_of_the_diffusion_is_noticed_on_resume(name: str) -> None:
    needs = {"label_dropout": {"null_class": 3}, "null_class": {}}.get(name, {})
    before, now = told(diffusion(**needs)), told(diffusion(**{**needs, name: OTHER[name]}))
    if name in MEANING:
        with pytest.raises(ValueError, match=rf"{name} is .*, but here has been trained with .*, must be the same"):
            compare({"settings": before}, now, {}, Path("here"))
    else:
        assert any(change.startswith(f"{name} was ") for change in compare({"settings": before}, now, {}, Path("here")))


@pytest.mark.parametrize("name", OTHER_RUN)
def test_another_setting_of_the_trainer_is_noticed_on_resume(name: str) -> None:
    changes = compare({"settings": told(diffusion())}, told(diffusion(), **{name: OTHER_RUN[name]}), {}, Path("here"))
    expected = [] if name in (*WITHOUT_EFFECT, *OF_THE_ORDER) else [name]
    assert [change.split()[0] for change in changes] == expected


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"schedule": NoiseSchedule.linear(50)}, "schedule"),
        ({"unet": network(block_out_channels=(8, 16))}, "network"),
        ({"unet": network(sample_size=16)}, "network"),
    ],
)
def test_another_schedule_or_network_is_another_run(changed: dict[str, Any], name: str) -> None:
    now = GaussianDiffusion(**{"unet": network(), "schedule": NoiseSchedule.cosine(50), **changed})
    with pytest.raises(ValueError, match=f"{name} is "):
        compare({"settings": told(diffusion())}, told(now), {}, Path("here"))


def test_every_field_of_a_network_is_in_the_config(tmp_path: Path) -> None:
    config: Any = network(dropout=0.2, freq_shift=1).config
    (tmp_path / "a.toml").write_text(to_toml({"model": dict(vars(config))}))
    tables = read_tables(tmp_path / "a.toml")
    assert tables["model"].keys() == {field.name for field in dataclasses.fields(UNetConfig)}
    assert UNetConfig().replace(**tables["model"]) == config


@pytest.mark.parametrize("name", ["none", "d\x7f", "a\nb", 'quo"te', "back\\slash", "file:x", "caf\udce9", "ünï"])
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    tables = {"data": {"folder": name}, "trainer": {"results_folder": name}}
    (tmp_path / "a.toml").write_text(to_toml(tables), encoding="utf-8")
    again = read_tables(tmp_path / "a.toml")
    for section, key in (("data", "folder"), ("trainer", "results_folder")):
        assert os.path.normpath(again[section][key]) == name


def test_a_run_into_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "r\udce9s"
    trainer(folder, train_num_steps=2).train()
    assert trainer(folder, train_num_steps=3, resume=True).train().step == 3
    assert len(load_pretrained(folder / "model").sampler(num_inference_steps=2).sample(1, class_labels=0)) == 1


# -- what the model says ---------------------------------------------------------------------------------------------


def test_the_null_class_and_the_labels_that_occur(tmp_path: Path) -> None:
    unet = network(null_class=None)
    run = trainer(tmp_path, GaussianDiffusion(unet, NoiseSchedule.cosine(50), null_class=3, label_dropout=0.2))
    run.train()
    model = load_pretrained(tmp_path / "model")
    assert model.unet.config.null_class == 3
    assert model.sampler(guidance_scale=2.0, num_inference_steps=2).sample(1, class_labels=1).isfinite().all()
    assert model.label_names == {0: "0", 1: "1", 2: "2"}
    assert model.labels() == [0, 1, 2]


def test_a_self_conditioned_model(tmp_path: Path) -> None:
    made = GaussianDiffusion(network(in_channels=2), NoiseSchedule.cosine(50), self_condition=True)
    run = trainer(tmp_path, made)
    run.train()
    model = load_pretrained(tmp_path / "model")
    assert model.settings["self_condition"] is True
    options: dict[str, Any] = {"method": "dpmsolver++", "num_inference_steps": 2}
    drawn = model.sampler(**options).sample(2, class_labels=0)
    torch.testing.assert_close(drawn, run.sampler(**options).sample(2, class_labels=0), rtol=1e-5, atol=1e-5)
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "model" / "unet").config.in_channels == 2


class Exact(torch.nn.Module):
    """The best network for flat pictures whose brightness is N(0.5, 0.3^2), in v."""

    def __init__(self, bar: torch.Tensor) -> None:
        super().__init__()
        self.bar = bar

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, n = (q.sqrt().float().view(-1, 1, 1, 1) for q in (self.bar[t], 1 - self.bar[t]))
        count = x[0].numel()
        x0 = 0.5 + a * 0.09 / (a**2 * 0.09 + n**2 / count) * (x.mean((1, 2, 3), keepdim=True) - a * 0.5)
        return a * (x - a * x0) / n - n * x0


def test_a_model_of_zero_terminal_snr_is_drawn_from_its_end(tmp_path: Path) -> None:
    """Of the spacings only "trailing" visits the last timestep, where nothing is left of the picture's brightness."""
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    save_pretrained(tmp_path, network(), schedule, prediction_type="v_prediction", clip_sample=False)
    model = load_pretrained(tmp_path)
    assert model.settings["timestep_spacing"] == "trailing"
    exact = dataclasses.replace(model, unet=Exact(model.schedule.alphas_cumprod))
    drawn = exact.sampler(num_inference_steps=5).sample(300, shape=(3, 32, 32), batch_size=100)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * 0.3 / 300**0.5)
    made = GaussianDiffusion(network(), schedule, prediction_type="v_prediction")
    run = trainer(tmp_path / "run", made)
    assert int(run.sampler(num_inference_steps=5).timesteps[0]) == 999
    run.train()
    assert load_pretrained(tmp_path / "run" / "model").settings["timestep_spacing"] == "trailing"


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "occur"), [([0, 255], [0, 255]), ([1, 2, 3], [1, 2, 3]), ([4, 4], [4])])
def test_labels_that_occur_are_those_that_are_drawn(tmp_path: Path, labels: list[int], occur: list[int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images, np.resize(labels, 12))
    assert look_at(tmp_path / "a.npz").classes == max(labels) + 1
    unet = network(num_class_embeds=257, null_class=256)
    run = trainer(tmp_path / "run", GaussianDiffusion(unet, NoiseSchedule.cosine(50)), tmp_path / "a.npz")
    assert run.labels == tuple(occur)
    run.train()
    assert load_pretrained(tmp_path / "run" / "model").labels() == occur


def test_a_class_without_a_picture_that_can_be_read_is_not_drawn(tmp_path: Path) -> None:
    for name, whole in (("a", True), ("b", False), ("c", True)):
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(2):
            path = tmp_path / "d" / name / f"{index}.png"
            Image.new("L", (8, 8), 40 * index).save(path) if whole else path.write_bytes(b"broken")
    for cache_bytes in (0, 1 << 20):
        source = open_data(tmp_path / "d", (1, 8, 8), cache_bytes=cache_bytes)
        assert (source.classes, source.labels) == (("a", "b", "c"), (0, 2))
    run = trainer(tmp_path / "run", data=tmp_path / "d")
    run.train()
    assert load_pretrained(tmp_path / "run" / "model").label_names == {0: "a", 2: "c"}


def test_classes_that_moved_end_a_resume(tmp_path: Path) -> None:
    def put(name: str) -> None:
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (8, 8), 40 * index).save(tmp_path / "d" / name / f"{index}.png")

    put("cat")
    put("dog")
    trainer(tmp_path / "run", data=tmp_path / "d", train_num_steps=2).train()
    put("bird")  # comes first: every other label is another class now
    with pytest.raises(ValueError, match="the class 'bird' for label 0, but .* has been trained with 'cat' there"):
        trainer(tmp_path / "run", data=tmp_path / "d", resume=True)


# -- data that change on the way -------------------------------------------------------------------------------------


class Changes(Patterns):
    """From the third image on they are other ones."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index)
        return (image if self.read <= 2 else self.change(image)), label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x + 1) * 127.5, r"values from .*, must be in \[-1, 1\]"),
        (lambda x: x[:, :4], r"images of \[1, 8, 8\] and of \[1, 4, 8\]"),
        (lambda x: x.expand(3, 8, 8), r"images of \[1, 8, 8\] and of \[3, 8, 8\]"),
    ],
)
def test_data_that_begin_well_are_checked_on(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, data=Changes(change)).train()


def test_data_without_a_value_below_zero_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bright(Patterns):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return image / 2 + 0.5, label

    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, data=Bright()).train()
        trainer(tmp_path / "good").train()
    assert sum("no value below 0" in message for message in caplog.messages) == 1
