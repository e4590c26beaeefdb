"""Models in folders and files of other kinds, or damaged: loaded, or refused in one line that names file and field."""

from __future__ import annotations

import json
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from unets import TINY

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, UNet, accelerate, load_pretrained, save_pretrained

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", UNet(**TINY), NoiseSchedule.linear(100))
    return tmp_path / "model"


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(v, b.unet.state_dict()[k]) for k, v in a.unet.state_dict().items())


# -- other kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(folder: Path, safe: bool, variant: str | None) -> None:
    whole = load_pretrained(folder)
    (folder / WEIGHTS).unlink()
    whole.unet.to_diffusers().save_pretrained(
        folder / "unet", max_shard_size="20KB", safe_serialization=safe, variant=variant
    )
    files = sorted(path.name for path in (folder / "unet").iterdir())
    assert len(files) > 3
    assert same(load_pretrained(folder, variant=variant), whole)
    part = next(name for name in files if "-00002-" in name)
    (folder / "unet" / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"{part} is missing, which .*index.* lists"):
        load_pretrained(folder, variant=variant)


@pytest.mark.parametrize("places", [None, {}, [], {"a": 3}, {"a": "../model_index.json"}, {"a": "/etc/passwd"}])
def test_indexes_of_shards_name_files_beside_them(folder: Path, places: Any) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index.json: weight_map must name, for each tensor, a file beside it"):
        load_pretrained(folder)


def test_runs_and_their_checkpoints_lead_to_their_models(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    Trainer(
        GaussianDiffusion(UNet(**TINY), NoiseSchedule.linear(20)), list(data), results_folder=str(run),
        train_num_steps=4, train_batch_size=4, save_every=2, num_workers=0, tensorboard=False, num_samples=1,
        ema_warmup=False, ema_decay=0.5, train_lr=1e-2,
    ).train()  # fmt: skip
    model = load_pretrained(run / "model")
    assert same(load_pretrained(run), model)
    assert same(load_pretrained(run / "checkpoints" / "step-0000004"), model)
    before = run / "checkpoints" / "step-0000002"
    assert not same(load_pretrained(before), model)
    stored = load_file(before / "diffusion.safetensors")["unet.conv_out.bias"]
    assert torch.equal(load_pretrained(before, ema=False).unet.conv_out.bias, stored)
    assert not torch.equal(load_pretrained(before).unet.conv_out.bias, stored)
    (run / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="run is a training run without a model yet"):
        load_pretrained(run)


# -- damaged and hostile ----------------------------------------------------------------------------------------------


def edit_config(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / ("unet/config.json" if name in TINY else "scheduler/scheduler_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return write


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nested config": (write("unet/config.json", "[" * 100_000), "config.json is not valid JSON: it is nested too deep"),
    "nested index": (write("model_index.json", '{"a":' * 100_000), "model_index.json is not valid JSON"),
    "latin-1": (write("unet/config.json", '{"a": "é"}'.encode("latin-1")), "config.json is not valid JSON"),
    "many layers": (edit_config("layers_per_block", 200), "config.json: layers_per_block is 200, but .* has 1"),
    "more layers": (edit_config("layers_per_block", 2000), "json: layers_per_block is 2000, must be an integer from 1"),
    "wide": (edit_config("block_out_channels", [2**40, 2**40]), "config.json: block_out_channels is .* up to 16777216"),
    "many levels": (
        lambda folder: [edit_config(name, value)(folder) for name, value in (
            ("block_out_channels", [8] * 5000), ("down_block_types", ["DownBlock2D"] * 5000),
            ("up_block_types", ["UpBlock2D"] * 5000))],
        "block_out_channels has 5000 widths, but .* has 2 levels",
    ),
    "pixels": (edit_config("sample_size", 2**40), "config.json: sample_size is 1099511627776, must be"),
    "digits": (write("unet/config.json", '{"sample_size": ' + "9" * 5000 + "}"), "config.json is not valid JSON"),
    "steps": (edit_config("num_train_timesteps", 2**40), "scheduler_config.json: num_train_timesteps is 1099511627776"),
    "betas": (edit_config("trained_betas", [10**400]), "scheduler_config.json: betas is a list, must be"),
    "integers": (
        edit_weights(lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int8)})),
        "safetensors: conv_in.bias has dtype torch.int8, must be a floating-point type",
    ),
    "other shape": (edit_weights(lambda s: s.update({"conv_in.bias": torch.zeros(9)})), "another shape: conv_in.bias"),
    "empty": (write(WEIGHTS, b""), "safetensors cannot be read"),
    "cut off": (lambda root: (root / WEIGHTS).write_bytes((root / WEIGHTS).read_bytes()[:-100]), "cannot be read"),
    "header": (write(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), "safetensors cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folders_are_refused_at_once(folder: Path, case: str) -> None:
    change, words = FOLDERS[case]
    change(folder)
    start = time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(folder)
    assert time.process_time() - start < 2
    assert "\n" not in str(caught.value)


def zipped(compression: int) -> Callable[[Path], None]:
    """A file of torch's whose tensor of 2**26 zeros is compressed."""

    def make(path: Path) -> None:
        torch.save({"model": {"betas": torch.zeros(2**22)}}, path)
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members:
                archive.writestr(name, content)

    return make


def saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def cut(path: Path) -> None:
    torch.save({"model": {"betas": torch.rand(9999)}}, path)
    path.write_bytes(path.read_bytes()[:20_000])


UNSHARED = torch.zeros(1).expand(2**34)
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "picture": (lambda path: Image.new("L", (8, 8)).save(path, "PNG"), r"begins with b'\\x89PNG.*that torch saved"),
    "text": (lambda path: path.write_text("hello"), "begins with b'hello', must be a file that torch saved"),
    "empty": (lambda path: path.write_bytes(b""), "begins with b''"),
    "cut off": (cut, "cannot be read"),
    "zip bomb": (zipped(zipfile.ZIP_DEFLATED), "would expand to 16.8 MB, must be stored without compression"),
    "bytearray": (lambda path: path.write_bytes(pickle.dumps(bytearray(2), 2)), "it holds a bytearray"),
    "list": (saved([torch.zeros(2)]), "has list, must have 'ema' and 'model'"),
    "numbers": (saved({"ema": {"betas": 3}}), "'ema': betas is a int, must be a tensor"),
    "keys": (saved({"ema": {3: torch.zeros(2)}}), "has a key '3', must have names of tensors"),
    "sparse": (saved({"ema": {"betas": torch.zeros(2).to_sparse()}}), "betas is sparse, quantized or without values"),
    "expanded": (saved({"ema": {"betas": UNSHARED}}), r"betas states \[17179869184\], more numbers than"),
    "no betas": (saved({"ema": {"x": torch.zeros(2)}}), "has no ema_model.betas"),
    "scalars": (
        saved({"ema": {f"ema_model.{name}": torch.tensor(1.0) for name in (
            "betas", "model.init_conv.weight", "model.time_mlp.1.weight", "model.final_conv.weight")}}),
        r"time_mlp.1.weight \[\], .* must have two and four dimensions",
    ),
    "flat": (
        saved({"ema": {"ema_model.betas": torch.ones(3), "ema_model.model.init_conv.weight": torch.ones(8, 1, 7, 7),
                       "ema_model.model.time_mlp.1.weight": torch.ones(2), "ema_model.model.final_conv.weight":
                       torch.ones(1, 8, 1, 1)}}),
        "must have two and four dimensions",
    ),
    "integers": (
        saved({"ema": {f"ema_model.{name}": torch.ones(8, 1, 7, 7, dtype=torch.int32) for name in (
            "betas", "model.init_conv.weight", "model.time_mlp.1.weight", "model.final_conv.weight")}}),
        "must be floating-point numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_odd_files_are_refused_at_once(tmp_path: Path, case: str) -> None:
    make, words = FILES[case]
    path = tmp_path / "model-1.pt"
    make(path)
    start = time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(path, image_size=8)
    assert time.process_time() - start < 2
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# -- words ------------------------------------------------------------------------------------------------------------


def test_levels_that_underflow_are_named() -> None:
    """Finite betas, of which float32 leaves levels of 0: the betas computed from those would be nan."""
    scheduler = DDPMScheduler(beta_start=0.01, beta_end=0.2)
    with pytest.raises(ValueError, match=r"beta_end is 0.2, so large that alphas_cumprod is 0 in float32"):
        accelerate((UNet(**TINY).to_diffusers(), scheduler), allow_general=False)


def test_narrow_networks_are_named_by_their_width() -> None:
    with pytest.raises(ValueError, match=r"^block_out_channels is \(1,\), must be at least 2, for a sine and a cosine"):
        UNet(
            block_out_channels=(1,), norm_num_groups=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        )
    with pytest.raises(ValueError, match="^timestep_channels is 1, must be at least 2"):
        UNet(**TINY, timestep_channels=1)


def test_values_are_not_printed_whole() -> None:
    with pytest.raises(ValueError, match="^betas is a list, must be a sequence of numbers") as caught:
        NoiseSchedule.from_betas([[0.1] * 500, "x"])
    assert len(str(caught.value)) < 300
