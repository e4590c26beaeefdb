"""Models that are no plain pipeline folder: averaged weights, variants, latents, the hub, other libraries' files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from unets import TINY

from fastddpm import NoiseSchedule, UNet, accelerate, load_pretrained, save_pretrained
from fastddpm.interop import guided_diffusion, hub
from fastddpm.interop.guided_diffusion import weights
from fastddpm.interop.guided_diffusion.flags import model_flags, unet_config


def bias(model: Any) -> Any:
    return model.unet.conv_out.bias.tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", UNet(**TINY), NoiseSchedule.linear(100))
    return tmp_path / "model"


# -- averaged weights and variants ------------------------------------------------------------------------------------


def test_averaged_weights_as_diffusers_saves_them(tmp_path: Path) -> None:
    """What its training example writes: checkpoints with both weights, and in the end a pipeline."""
    model = UNet2DModel(**TINY)
    DDPMPipeline(model, DDPMScheduler(num_train_timesteps=30)).save_pretrained(tmp_path)
    average = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)
    average.shadow_params[-1].fill_(0.25)  # the bias of the last convolution
    checkpoint = tmp_path / "checkpoint-5"
    average.save_pretrained(checkpoint / "unet_ema")
    model.save_pretrained(checkpoint / "unet")
    assert "optimization_step" in json.loads((checkpoint / "unet_ema" / "config.json").read_text())
    loaded = load_pretrained(checkpoint)
    assert bias(loaded) == [0.25]
    assert loaded.schedule.num_train_timesteps == 30  # of the folder above
    assert bias(load_pretrained(checkpoint, ema=False)) == model.conv_out.bias.tolist()
    assert bias(load_pretrained(tmp_path)) == bias(load_pretrained(tmp_path, ema=False)) != [0.25]


def test_variants_are_files_of_other_names(folder: Path) -> None:
    model = UNet.from_pretrained(folder / "unet").to_diffusers()
    with torch.no_grad():
        model.conv_out.bias.fill_(0.5)
    model.save_pretrained(folder / "unet", variant="non_ema")
    assert bias(load_pretrained(folder, variant="non_ema")) == [0.5]
    assert bias(load_pretrained(folder)) != [0.5]
    with pytest.raises(FileNotFoundError, match=r"has neither diffusion_pytorch_model.fp16.safetensors nor .*fp16.bin"):
        load_pretrained(folder, variant="fp16")


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    decoder = VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        num_vq_embeddings=4,
    )
    LDMPipeline(decoder, UNet2DModel(**TINY), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


def test_latents_are_decoded(latent: Path) -> None:
    model = load_pretrained(latent)
    x = model.sampler(num_inference_steps=3).sample(3, seed=1)
    assert x.shape == (3, 1, 8, 8)
    images = model.decode(x, batch_size=2)
    expected = VQModel.from_pretrained(latent / "vqvae").decode(x / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert images.shape == (3, 3, 16, 16)


def test_latents_need_a_decoder_and_diffusers(latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = latent / "vqvae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="vqvae cannot be loaded as a VQModel"):
        load_pretrained(latent)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"diffusers is needed: pip install 'fastddpm\[diffusers\]'"):
        load_pretrained(latent)
    shutil.rmtree(latent / "vqvae")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="vqvae is missing, which decodes the latents"):
        load_pretrained(latent)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without a connection to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, folder: Path, name: str, revision: str = "main", commit: str = "a" * 40) -> None:
    """A model as huggingface_hub keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(commit)


def test_models_in_the_local_cache_of_the_hub(cache: Path, folder: Path, tmp_path: Path) -> None:
    put(cache, folder, "someone/digits-8")
    save_pretrained(tmp_path / "other", UNet(**TINY), NoiseSchedule.linear(50))
    put(cache, tmp_path / "other", "someone/digits-8", "v2", "b" * 40)
    model = load_pretrained("someone/digits-8")
    assert bias(model) == bias(load_pretrained(folder))
    assert load_pretrained("someone/digits-8@v2").schedule.num_train_timesteps == 50
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set and .*cache does not hold it"):
        load_pretrained("someone/digits-8@v3")


def test_only_what_is_needed_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the hub with two kinds of weights, and more files."""
    shutil.copytree(folder / "unet", folder / "unet_ema")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    for part in ("unet_ema", "unet"):
        asked: list[str] = []

        def fake(repository: str, *, revision: str | None, allow_patterns: list[str], asked: list[str] = asked) -> str:
            assert (repository, revision) == ("google/ddpm", "main")
            asked += allow_patterns
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        load_pretrained("google/ddpm@main", ema=part == "unet_ema")
        assert [name for name in asked if "*" in name or name.endswith((".safetensors", ".bin"))] == [
            f"{part}/diffusion_pytorch_model.safetensors"
        ]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin cannot be read"):
        load_pretrained("google/ddpm@main", ema=False)
    assert asked[-1] == "unet/diffusion_pytorch_model.bin"


def test_what_the_hub_answers_is_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def refuse(error: Exception) -> None:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", raising)

    refuse(RuntimeError("the line\nis down"))
    with pytest.raises(FileNotFoundError, match="a/b is no local file or folder, and .* gave RuntimeError: the line$"):
        load_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"huggingface_hub is needed: pip install 'fastddpm\[hub\]'"):
        load_pretrained("a/b")
    for name in ("nothing", "a/b/c", "./a", "a b/c"):
        assert hub.parse(name) is None
        with pytest.raises(FileNotFoundError, match="is not a folder, must be one with unet/"):
            load_pretrained(name)
    assert hub.parse("a/b@refs/pr/1") == ("a/b", "refs/pr/1")


# -- files of other libraries -----------------------------------------------------------------------------------------


def trainer_file(path: Path, **arguments: Any) -> tuple[Any, Any]:
    """What a Trainer of denoising_diffusion_pytorch saves: the diffusions of the average and of the weights."""
    torch.manual_seed(1)
    given = {"dim": 8, "dim_mults": (1, 2), "channels": 1, **arguments}
    network = Unet(**given)
    diffusion = GaussianDiffusion(network, image_size=(8, 4), timesteps=30, objective="pred_x0")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        average = EMA(diffusion)
        average.ema_model.model.final_conv.bias += 0.1
    data = {"step": 1, "model": diffusion.state_dict(), "ema": average.state_dict(), "opt": {}, "version": "2"}
    torch.save(data, path)
    return average.ema_model, diffusion


@pytest.mark.parametrize(
    "arguments",
    [
        {"self_condition": True, "channels": 2},
        {"full_attn": (True, False), "attn_heads": (2, 3), "attn_dim_head": (8, 4), "init_dim": 16, "dim": 4},
        {"dim_mults": (1, 2, 2), "sinusoidal_pos_emb_theta": 1000},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_trainer_files_give_the_librarys_samples(arguments: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    known = {"image_size": "8,4"}
    if "sinusoidal_pos_emb_theta" in arguments:
        known["sinusoidal_pos_emb_theta"] = "1000"
    for theirs, ema in zip(trainer_file(path, **arguments), (True, False), strict=True):
        model = load_pretrained(path, ema=ema, **known)
        ours = model.sampler().sample(2, seed=3)
        expected = accelerate(theirs, progress=False).sample(2, seed=3)
        torch.testing.assert_close(ours / 2 + 0.5, expected, rtol=0, atol=1e-5)
        theirs.sampling_timesteps, theirs.is_ddim_sampling = 7, True
        expected = accelerate(theirs, progress=False).sample(2, seed=3)
        ours = model.sampler(method="ddim", num_inference_steps=7).sample(2, seed=3)
        torch.testing.assert_close(ours / 2 + 0.5, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        ({}, ValueError, "image_size is missing, must be given: .*model-1.pt does not say"),
        ({"image_size": 7}, ValueError, "image_size is 7, must be one or two multiples of 2"),
        ({"image_size": "8,x"}, ValueError, "image_size is '8,x', must be"),
        ({"image_size": 8, "objective": "pred_v"}, ValueError, "objective is 'pred_v' but .* trained with 'pred_x0'"),
        ({"image_size": 8, "objective": "score"}, ValueError, "objective is 'score', must be one of pred_noise"),
        ({"image_size": 8, "sinusoidal_pos_emb_theta": "big"}, ValueError, "theta is 'big', must be a number"),
        ({"image_size": 8, "num_channels": 3}, TypeError, "num_channels is given but .* takes image_size, objective"),
        ({"image_size": 8, "variant": "ema"}, ValueError, "variant is 'ema' but .* is a file"),
    ],
)
def test_what_is_said_of_trainer_files(
    known: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    trainer_file(tmp_path / "model-1.pt")
    with pytest.raises(error, match=message):
        load_pretrained(tmp_path / "model-1.pt", **known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.init_conv.weight"), "has no init_conv.weight, must be of a Unet"),
        (lambda state: state.pop("model.downs.1.2.mem_kv"), "no downs.1.2.mem_kv, must be of a Unet"),
        (lambda state: state.update({"model.init_conv.weight": torch.zeros(8, 1, 7)}), "a network for sequences"),
        (lambda state: state.update({"model.init_conv.weight": torch.zeros(8, 3, 7, 7)}), "reads 3 channels and"),
        (lambda state: state.pop("model.mid_block1.block1.proj.bias"), "lacks mid_block1.block1.proj.bias"),
        (lambda state: state.update({"model.more": torch.zeros(1)}), "also has more"),
        (
            lambda state: state.update({"model.time_mlp.0.weights": torch.zeros(1)}),
            "a learned or random time embedding",
        ),
        (lambda state: state.pop("betas"), "has no betas in 'model'"),
    ],
)
def test_other_networks_are_named(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    trainer_file(path)
    data = torch.load(path, weights_only=True)
    change(data["model"])
    torch.save(data, path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(path, ema=False, image_size=8)


FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}


def test_files_of_guided_diffusion(tmp_path: Path) -> None:
    path = tmp_path / "8x8.pt"
    torch.save({"time_embed.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="flags are missing, must be given: .*8x8.pt does not say"):
        load_pretrained(path)
    with pytest.raises(TypeError, match="colour"):
        load_pretrained(path, colour=3)
    with pytest.raises(ValueError, match="8x8.pt"):
        load_pretrained(path, **FLAGS)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has weight, must have 'ema' and 'model', .*or 'time_embed.0.weight'"):
        load_pretrained(path, **FLAGS)


@pytest.mark.parametrize("respacing", ["", "ddim5", "6"])
def test_a_file_of_guided_diffusion_samples_as_load_sampler(respacing: str, guided_file: Path) -> None:
    expected = guided_diffusion.load_sampler(guided_file, respacing, diffusion_steps=40, **FLAGS)
    model = load_pretrained(guided_file, timestep_respacing=respacing, diffusion_steps="40", **FLAGS)
    sampler = model.sampler()
    assert sampler.timesteps.tolist() == expected.timesteps.tolist()
    assert sampler.method == expected.method
    assert torch.equal(sampler.sample(1, seed=2), expected.sample(1, seed=2))
    assert model.sampler(timesteps=[30, 3]).timesteps.tolist() == [30, 3]


@pytest.fixture
def guided_file(tmp_path: Path) -> Path:
    """A state dict of guided-diffusion's names and shapes, of random weights."""
    unet = UNet(unet_config(model_flags("guided_diffusion", FLAGS)))
    state = {s.name: 0.1 * torch.randn(s.shape) for s in weights.sources(unet, weights.unet_names(unet)).values()}
    torch.save(state, tmp_path / "8x8.pt")
    return tmp_path / "8x8.pt"


def test_parts_are_not_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="unet holds one part of a pipeline, must be the folder that holds"):
        load_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="the weights of a pipeline are loaded by naming its folder"):
        load_pretrained(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(TypeError, match="image_size is given but .* is no file, must be left out"):
        load_pretrained(folder, image_size=8)
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "AnimateDiffPipeline", "unet": ["diffusers", "UNetMotionModel"]}))
    with pytest.raises(ValueError, match="AnimateDiffPipeline has a unet of class UNetMotionModel, must be"):
        load_pretrained(folder)
    index.write_text(json.dumps({"_class_name": "Other", "vqvae": ["diffusers", "AsymmetricAutoencoderKL"]}))
    with pytest.raises(ValueError, match="vqvae is of class AsymmetricAutoencoderKL, must be VQModel or AutoencoderKL"):
        load_pretrained(folder)
