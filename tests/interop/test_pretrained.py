"""Pipeline folders, written and read, in both directions with diffusers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from unets import TINY

from fastddpm import NoiseSchedule, Sampler, UNet, load_pretrained, save_pretrained
from fastddpm.interop.scheduler_config import load_scheduler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", UNet(**TINY), NoiseSchedule.linear(100))
    return tmp_path / "model"


SCHEDULES = [
    NoiseSchedule.linear(50, 1e-3, 0.05),
    NoiseSchedule.scaled_linear(50, 1e-3, 0.05),
    NoiseSchedule.cosine(50),
    NoiseSchedule.cosine(50, max_beta=0.5),
    NoiseSchedule.sigmoid(50, 1e-3, 0.05),
    NoiseSchedule.from_betas([0.1, 0.2, 0.3]),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.beta_schedule)
def test_what_is_saved_is_loaded_here_and_by_diffusers(schedule: NoiseSchedule, tmp_path: Path) -> None:
    unet = UNet(**TINY).eval()  # in training mode a CPU convolves in another way
    settings = {"prediction_type": "v_prediction", "variance_type": "fixed_large", "clip_sample_range": 2.0}
    save_pretrained(tmp_path, unet, schedule, **settings)  # type: ignore[arg-type]
    ours = load_pretrained(tmp_path)
    assert torch.equal(ours.schedule.betas, schedule.betas)
    assert ours.schedule.beta_schedule == schedule.beta_schedule
    assert settings.items() <= ours.settings.items()
    theirs = DDPMPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.scheduler.betas, schedule.betas.float(), rtol=3e-6, atol=1.2e-7)
    assert settings.items() <= dict(theirs.scheduler.config).items()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        expected = unet(x, t)
        assert torch.equal(ours.unet(x, t), expected)
        torch.testing.assert_close(theirs.unet(x, t).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_what_diffusers_saves_is_loaded(kind: type, tmp_path: Path) -> None:
    scheduler = kind(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", steps_offset=1)
    DDPMPipeline(UNet2DModel(**TINY), scheduler).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.schedule.beta_schedule == "squaredcos_cap_v2"
    sampler = model.sampler(num_inference_steps=10)
    scheduler.set_timesteps(10)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.method == ("ddpm" if kind is DDPMScheduler else "ddim")
    assert sampler.sample(1).shape == (1, 1, 8, 8)


def test_multistep_solver_of_diffusers_is_loaded(folder: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=100, solver_order=1, final_sigmas_type="sigma_min", prediction_type="v_prediction"
    )
    scheduler.save_pretrained(folder / "scheduler")
    model = load_pretrained(folder)
    sampler = model.sampler(num_inference_steps=10)
    scheduler.set_timesteps(10)
    assert sampler.method == "dpmsolver++"
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.clip_range is None  # diffusers' solver does not clip
    assert not sampler.table.multistep
    assert sampler.table.levels[-1, 1] > 0
    assert model.sampler(method="ddim", num_inference_steps=10).table.levels[-1].tolist() == [1, 0]


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_zero_terminal_snr_is_loaded_and_saved(kind: Any, folder: Path, tmp_path: Path) -> None:
    scheduler = kind(
        num_train_timesteps=100,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=1.5,
    )
    scheduler.save_pretrained(folder / "scheduler")
    model = load_pretrained(folder)
    assert model.schedule.zero_terminal_snr
    torch.testing.assert_close(model.schedule.betas.float(), scheduler.betas, rtol=1e-4, atol=1e-6)
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    assert thresholds.items() <= model.settings.items()
    assert model.sampler(num_inference_steps=5).sample(1).isfinite().all()
    save_pretrained(tmp_path / "again", model.unet, model.schedule, prediction_type="v_prediction")
    again = load_pretrained(tmp_path / "again")
    assert torch.equal(again.schedule.betas, model.schedule.betas)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "again").scheduler
    assert theirs.alphas_cumprod[-1] == 0


def test_settings_of_another_method_are_left_out(folder: Path) -> None:
    DDIMScheduler(num_train_timesteps=100, set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    model = load_pretrained(folder)
    assert model.sampler(num_inference_steps=5).table.levels[-1, 1] > 0
    assert model.sampler(method="ddpm", num_inference_steps=5).table.levels[-1, 1] == 0


def test_settings_can_be_overridden(folder: Path) -> None:
    sampler = load_pretrained(folder).sampler(method="ddim", eta=0.5, num_inference_steps=3)
    assert sampler.method == "ddim"


def test_network_dtype(folder: Path) -> None:
    unet = UNet(**TINY).half()
    save_pretrained(folder, unet, NoiseSchedule.linear(10))
    assert load_pretrained(folder).unet.dtype == torch.float32
    assert load_pretrained(folder, dtype=None).unet.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "TCDScheduler"}, "_class_name is 'TCDScheduler', must be one of"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps is False, only True is supported"),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "algorithm_type is 'sde-dpmsolver\\+\\+', must be one of 'dpmsolver\\+\\+', 'dpmsolver'$",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpm"}, "algorithm_type is 'dpm', must be"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas are both true"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True, only False is supported"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"trained_betas": [0.1, float("nan")]}, r"betas\[1\] is nan"),
        ({"beta_start": "low"}, "scheduler_config.json"),
    ],
)
def test_unsupported_schedulers_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_scheduler(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"algorithm_type": "sde-dpmsolver++"}, {"method": "sde-dpmsolver++"}),
        ({"use_karras_sigmas": True}, {"method": "dpmsolver++", "sigma_schedule": "karras"}),
        ({"lambda_min_clipped": -0.1}, {"lambda_min_clipped": -0.1}),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"method": "plms"}),
    ],
)
def test_settings_of_solvers_are_read(folder: Path, change: dict[str, Any], settings: dict[str, Any]) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    content = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 100}
    path.write_text(json.dumps(content | change))
    assert settings.items() <= load_scheduler(path)[1].items()
    images = load_pretrained(folder).sampler(num_inference_steps=4).sample(1, seed=0)
    path.write_text(json.dumps(content))
    assert not torch.equal(images, load_pretrained(folder).sampler(num_inference_steps=4).sample(1, seed=0))


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "unet/config.json"])
def test_missing_and_corrupt_configurations_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        load_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_corrupt_weights_are_named(folder: Path, content: bytes | None) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_pretrained(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_not_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for write in (lambda file: pickle.dump(Bomb(), file), lambda file: torch.save({"w": Bomb()}, file)):
        with (folder / "unet" / "diffusion_pytorch_model.bin").open("wb") as file:
            write(file)
        with pytest.raises(ValueError, match="diffusion_pytorch_model.bin"):
            load_pretrained(folder)
    assert not Path("exploded").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        load_pretrained(tmp_path / "nothing")


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prediction_type is 'score'"):
        save_pretrained(tmp_path / "model", UNet(**TINY), NoiseSchedule.linear(10), prediction_type="score")
    assert not (tmp_path / "model").exists()


def test_old_folders_without_subfolders_are_loaded(tmp_path: Path) -> None:
    DDPMPipeline(UNet2DModel(**TINY), DDPMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path)
    for path in [*tmp_path.glob("unet/*"), *tmp_path.glob("scheduler/*")]:
        path.rename(tmp_path / path.name)
    (tmp_path / "unet").rmdir()
    (tmp_path / "scheduler").rmdir()
    assert load_pretrained(tmp_path).sampler(num_inference_steps=2).sample(1).shape == (1, 1, 8, 8)


def test_learned_variance_of_a_multistep_scheduler_is_read(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    change = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range", "clip_sample": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    schedule, settings = load_scheduler(path)
    assert settings["variance_type"] == "learned_range"
    assert "clip_sample" not in settings  # that scheduler has no such field, and does not clip
    two = UNet(**{**TINY, "out_channels": 2})
    assert Sampler(two, schedule, **settings).clip_range is None


@pytest.mark.parametrize("name", ["clip_sample", "thresholding"])
def test_flags_must_be_flags(folder: Path, name: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "no"}))
    with pytest.raises(ValueError, match=f"{name} is 'no', must be true or false"):
        load_scheduler(path)
