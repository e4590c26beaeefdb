"""Checkpoints of denoising_diffusion_pytorch's Trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
from lucidrains_objects import CLOSE, SCHEDULES, STEPS, Fixed, both, diffusion, fast, same, unet

from fastddpm.interop.lucidrains import AcceleratedDiffusion, load_trainer_checkpoint
from fastddpm.interop.lucidrains.tables import OBJECTIVES


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("images")
    for index in range(100):
        Image.new("RGB", (8, 8), (index, 2 * index, 50)).save(folder / f"{index}.png")
    result = Trainer(
        diffusion(objective="pred_x0", beta_schedule="cosine", min_snr_loss_weight=True),
        folder,
        num_samples=1,
        calculate_fid=False,
        results_folder=str(tmp_path_factory.mktemp("results")),
        ema_update_every=1,
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in result.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        result.ema.step.fill_(1000)  # past its warm-up, in which it only copies
        result.ema.update()
    result.save(1)
    return result


@pytest.fixture(scope="module")
def checkpoint(trainer: Trainer) -> Path:
    return trainer.results_folder / "model-1.pt"


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize("built", [False, True])
def test_trainer_checkpoint(trainer: Trainer, checkpoint: Path, weights: str, built: bool) -> None:
    saved = trainer.ema.ema_model if weights == "ema" else trainer.model
    options = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    if built:
        loaded = load_trainer_checkpoint(checkpoint, options, weights=weights, image_size=8)
    else:
        template = diffusion(objective="pred_x0", beta_schedule="linear")
        before = copy.deepcopy(template.state_dict())
        loaded = load_trainer_checkpoint(checkpoint, template, weights=weights)
        assert all(torch.equal(before[name], value) for name, value in template.state_dict().items())
    assert isinstance(loaded, GaussianDiffusion)
    assert not loaded.training
    assert loaded.objective == "pred_x0"
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(trainer.ema.ema_model.model.init_conv.weight, trainer.model.model.init_conv.weight)
    same(both(saved.eval(), fast(loaded), "sample", 2))


def test_trainer_samples_in_place(trainer: Trainer) -> None:
    """What `Trainer.train` does every save_and_sample_every steps."""
    averaged = trainer.ema.ema_model
    fast(averaged, inplace=True)
    try:
        with torch.inference_mode():
            torch.manual_seed(3)
            images = averaged.sample(batch_size=2)
        torch.manual_seed(3)
        expected = type(averaged).sample(averaged, 2)
        torch.testing.assert_close(images, expected, rtol=0, atol=CLOSE)
    finally:
        for name in AcceleratedDiffusion.methods:
            delattr(averaged, name)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [STEPS, 1000])
def test_the_objective_is_known_from_the_file(tmp_path: Path, objective: str, schedule: str, timesteps: int) -> None:
    theirs = diffusion(
        objective=objective, beta_schedule=schedule, timesteps=timesteps, min_snr_loss_weight=schedule == "cosine"
    )
    torch.save({"model": theirs.state_dict()}, tmp_path / "model-2.pt")
    options = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    loaded = load_trainer_checkpoint(tmp_path / "model-2.pt", options, weights="model", image_size=8)
    assert (loaded.objective, loaded.num_timesteps) == (objective, timesteps)


def test_checkpoint_errors_name_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model-9.pt is not a file"):
        load_trainer_checkpoint(checkpoint.with_name("model-9.pt"), diffusion())
    with pytest.raises(ValueError, match="objective is 'pred_v' but .*model-1.pt was trained with 'pred_x0'"):
        load_trainer_checkpoint(checkpoint, diffusion())
    with pytest.raises(ValueError, match="is of 24 timesteps but the diffusion has 30"):
        load_trainer_checkpoint(checkpoint, diffusion(objective="pred_x0", timesteps=30))
    with pytest.raises(ValueError, match=r"lacks model\.downs\.0\.2\.to_out\S*, .* and also has .*: the"):
        load_trainer_checkpoint(checkpoint, diffusion(unet(dim_mults=(1,)), objective="pred_x0"))
    with pytest.raises(ValueError, match=r"init_conv.weight of shape \[8, 3, 7, 7\], the diffusion has \[16, 3"):
        load_trainer_checkpoint(checkpoint, diffusion(unet(dim=16), objective="pred_x0"))
    with pytest.raises(ValueError, match="weights is 'online', must be one of ema, model"):
        load_trainer_checkpoint(checkpoint, diffusion(), weights="online")
    with pytest.raises(TypeError, match="image_size is missing"):
        load_trainer_checkpoint(checkpoint, {"dim": 8})
    with pytest.raises(TypeError, match="image_size is given along with a diffusion"):
        load_trainer_checkpoint(checkpoint, diffusion(), image_size=8)
    with pytest.raises(TypeError, match="diffusion is a int"):
        load_trainer_checkpoint(checkpoint, 8)
    torch.save({"model": diffusion().state_dict()}, tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match="has model, must have 'ema'"):
        load_trainer_checkpoint(tmp_path / "model-1.pt", diffusion())
    torch.save({"ema": {"step": torch.tensor(1)}}, tmp_path / "model-2.pt")
    with pytest.raises(ValueError, match="has no ema_model.betas"):
        load_trainer_checkpoint(tmp_path / "model-2.pt", diffusion())
    torch.save({"ema": Fixed()}, tmp_path / "model-3.pt")
    with pytest.raises(ValueError, match="model-3.pt cannot be read"):
        load_trainer_checkpoint(tmp_path / "model-3.pt", diffusion())
