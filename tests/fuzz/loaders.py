"""Every loader of the project with a way to make odd inputs for it, by hypothesis.

`LOADERS[name]` is (strategy, run): `run(folder, draw)` writes an input that it makes of the drawn value into `folder`
and loads it. It must return, or raise one of `REFUSALS` in one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fastddpm_kernels import tuned
from hypothesis import strategies as st
from PIL import Image

from fastddpm import NoiseSchedule, Sampler, UNet, load_pretrained, save_pretrained
from fastddpm.cli import _parser, main
from fastddpm.common import shards
from fastddpm.common.images import load_image, read_npz
from fastddpm.common.shards import FORMATS, MANIFEST
from fastddpm.evaluation.reading import open_images
from fastddpm.interop.guided_diffusion import load_unet, shapes
from fastddpm.interop.scheduler_config import load_scheduler
from fastddpm.scale import sample_shards
from fastddpm.training import read_log
from fastddpm.training.checkpoint import Checkpoint, Checkpoints
from fastddpm.training.config import RunConfig, read_tables

REFUSALS = (ValueError, TypeError, OSError)
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (4,), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2,
    "add_attention": False,
}  # fmt: skip
FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
WEIGHTS = "unet/diffusion_pytorch_model"

# -- odd values -------------------------------------------------------------------------------------------------------

_odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63, 10**400]),
    st.floats(), st.text(max_size=6), st.sampled_from(["../x", "epsilon", "linear", "none", "nan", "1e999", "\ud800"]),
)  # fmt: skip
odd = st.recursive(
    _odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
# Bytes: (what is done, where as a share of the length, with which bytes), one after the other.
_ways = st.sampled_from(["cut", "set", "insert", "remove", "repeat"])
edits = st.lists(st.tuples(_ways, st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5)


def edited(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Cut off, overwrite, insert, remove or repeat bytes."""
    for what, where, piece in changes:
        at = int(where * len(content))
        kept = content[at + len(piece) :]
        after = {"cut": b"", "set": piece + kept, "insert": piece + content[at:], "remove": kept}
        content = content[:at] + after.get(what, content[at : at + 99] * 3 + content[at:])
    return content


def text_of(content: dict[str, Any], change: Any) -> bytes:
    """JSON of a dictionary with odd values, nested deeply, or with its bytes edited."""
    if isinstance(change, list):
        return edited(json.dumps(content).encode(), change)
    if isinstance(change, int):
        return b'{"a":' * change
    return json.dumps(content | change).encode()


def changed(names: Any) -> st.SearchStrategy[Any]:
    """Odd values for some of the names, or edits of the bytes, or a depth of nesting."""
    values = st.dictionaries(st.sampled_from(sorted(names)), odd, min_size=1, max_size=3)
    return st.one_of(values, edits, st.sampled_from([10, 1000, 100_000]))


# -- valid files, made once -------------------------------------------------------------------------------------------


class Files:
    """A valid file of every kind, as bytes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.unet = UNet(**CONFIG)
        save_pretrained(folder, self.unet, NoiseSchedule.linear(10))
        self.pipeline = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()
        }
        self.json = {name: json.loads(content) for name, content in self.pipeline.items() if name.endswith(".json")}
        self.torch = {}
        for name, zipped in (("zip", True), ("pickle", False)):
            buffer = io.BytesIO()
            torch.save(self.unet.state_dict(), buffer, _use_new_zipfile_serialization=zipped)
            self.torch[name] = buffer.getvalue()
        arrays = {"arr_0": np.zeros((3, 4, 4, 1), np.uint8), "arr_1": np.arange(3)}
        self.arrays = {}
        for name, write in (("stored", np.savez), ("deflated", np.savez_compressed)):
            buffer = io.BytesIO()
            write(buffer, **arrays)
            self.arrays[name] = buffer.getvalue()
        buffer = io.BytesIO()
        np.save(buffer, arrays["arr_0"])
        self.array = buffer.getvalue()
        self.pictures = {}
        pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, kind)
            self.pictures[kind] = buffer.getvalue()
        self.shards = {}
        sampler = Sampler(self.unet, NoiseSchedule.linear(10), num_inference_steps=1)
        for kind in FORMATS:
            made = folder / kind
            sample_shards(sampler, made, 5, shard_size=3, format=kind, progress=False)
            self.shards[kind] = {
                path.relative_to(made).as_posix(): path.read_bytes() for path in sorted(made.rglob("*.*"))
            }
        self.guided = {name: 0.1 * torch.randn(shape) for name, shape in shapes(**FLAGS).items()}


_files: list[Files] = []


def files(folder: Path) -> Files:
    if not _files:
        _files.append(Files(folder / "valid"))
    return _files[0]


# -- loaders ----------------------------------------------------------------------------------------------------------


def pipeline(name: str) -> Callable[[Path, Any], object]:
    """Load a pipeline folder whose file `name` is odd."""

    def run(folder: Path, change: Any) -> object:
        valid = files(folder)
        place = folder / "pipeline"
        for other, content in valid.pipeline.items():
            path = place / other
            path.parent.mkdir(parents=True, exist_ok=True)
            if other != name:
                if not path.exists():
                    path.write_bytes(content)
            elif name in valid.json:
                path.write_bytes(text_of(valid.json[name], change))
            else:
                path.write_bytes(edited(content, change))
        try:
            return load_pretrained(place)
        finally:
            (place / name).write_bytes(valid.pipeline[name])

    return run


def scheduler(folder: Path, change: Any) -> object:
    path = folder / "scheduler.json"
    path.write_bytes(text_of(files(folder).json["scheduler/scheduler_config.json"], change))
    schedule, settings = load_scheduler(path)
    return Sampler(lambda x, t: x, schedule, num_inference_steps=1, **settings)


def torch_file(folder: Path, change: tuple[str, list[Any]]) -> object:
    path = folder / "model-1.pt"
    path.write_bytes(edited(files(folder).torch[change[0]], change[1]))
    return load_pretrained(path, image_size=8)


def pickled(folder: Path, content: Any) -> object:
    """A pickle that asks for any function at all to be called."""
    path = folder / "model-2.pt"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return load_pretrained(path, image_size=8)


class Call:
    """Becomes, in a pickle, the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


_tensor = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
)
_names = st.sampled_from([
    "betas", "loss_weight", "alphas_cumprod", *(f"model.{name}" for name in (
        "init_conv.weight", "init_conv.bias", "time_mlp.1.weight", "final_conv.weight", "downs.0.3.weight",
        "downs.0.2.mem_kv", "downs.0.2.to_out.weight", "downs.x.3.weight", "downs.99999999999.3.weight")),
])  # fmt: skip
_calls = st.builds(
    Call, st.sampled_from([print, bytearray, eval, open, torch.zeros, dict, Path]), st.sampled_from(["1", 2**33, "/"])
)


def trainer_file(folder: Path, state: Any) -> object:
    path = folder / "model-3.pt"
    torch.save(state, path)
    return load_pretrained(path, image_size=8, objective="pred_noise", ema=False)


def guided(folder: Path, change: tuple[dict[str, Any], dict[str, Any]]) -> object:
    state, flags = change
    names = sorted(files(folder).guided)
    given = dict(files(folder).guided) | {names[int(place) % len(names)]: value for place, value in state.items()}
    return load_unet(given, **FLAGS | flags)


def archive(folder: Path, change: tuple[str, Any]) -> object:
    kind, how = change
    path = folder / ("a.npy" if kind == "npy" else "a.npz")
    valid = files(folder)
    if kind in valid.arrays:
        path.write_bytes(edited(valid.arrays[kind], how))
    elif kind == "npy":
        path.write_bytes(edited(valid.array, how))
    else:  # a zip by another method, or of odd members
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED) as out:
            out.writestr("arr_0.npy", edited(valid.array, how))
            out.writestr("other", b"x")
    return read_npz(path, ("arr_0", "arr_1"))


def picture(folder: Path, change: tuple[str, list[Any]]) -> object:
    path = folder / f"a.{change[0].lower()}"
    path.write_bytes(edited(files(folder).pictures[change[0]], change[1]))
    return load_image(path, (3, 8, 8))


def shard(folder: Path, change: tuple[str, str, Any]) -> object:
    """Read shards of which one file is odd; one that whoever made it gave the right checksum."""
    kind, name, how = change
    valid = files(folder).shards[kind]
    place = folder / f"shards-{kind}"
    chosen = MANIFEST if name == "manifest" else sorted(valid)[-1 if name == "last" else 1]
    for other, content in valid.items():
        path = place / other
        path.parent.mkdir(parents=True, exist_ok=True)
        if other == chosen:
            path.write_bytes(text_of(json.loads(content), how) if name == "manifest" else edited(content, how))
        elif not path.exists():
            path.write_bytes(content)
    try:
        with mock.patch.object(shards, "check"):
            return sum(map(len, open_images(place).pieces()))
    finally:
        (place / chosen).write_bytes(valid[chosen])


def checkpoint(folder: Path, change: tuple[str, Any]) -> object:
    """Read a checkpoint of which one file is odd, by a manifest that knows it so, or knows it not."""
    name, how = change
    place = folder / "checkpoints"
    kept = Checkpoints(place)
    if not kept.steps():
        kept.save(1, Checkpoint({"diffusion": {"a": torch.ones(3)}}, {"rng": torch.ones(3), "n": [1, 2]}, {"b": 1}))
    path = kept.path(1) / name
    whole = path.read_bytes()
    path.write_bytes(text_of(json.loads(whole), how) if name.endswith("json") else edited(whole, how))
    try:
        if name == "manifest.json":
            return kept.load(kept.latest() or 1)
        with mock.patch.object(Checkpoints, "problem", return_value=None):
            return kept.load(1)
    finally:
        path.write_bytes(whole)


def run_log(folder: Path, change: Any) -> object:
    path = folder / "log.jsonl"
    path.write_bytes(edited(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n' * 3, change))
    return read_log(path)


TOML = (
    b'[data]\nfolder = "x"\n[model]\nsample_size = 8\n[diffusion]\nloss = "mse"\n[trainer]\ntrain_lr = 1e-4\nseed = 3\n'
)


def toml(folder: Path, change: Any) -> object:
    path = folder / "a.toml"
    if isinstance(change, int):
        content = b"[data]\nfolder = " + b"[" * change
    else:
        section, key, value = change[:3]
        content = (
            f"[{section}]\n{key} = {value}\n".encode(errors="replace")
            if isinstance(value, str)
            else edited(TOML, value)
        )
    path.write_bytes(content)
    return RunConfig.from_tables(read_tables(path), str(path))


_keys = st.sampled_from(
    ["sample_size", "folder", "loss", "train_lr", "seed", "ema_decay", "trained_betas", "num_workers"]
)
_toml = st.sampled_from(
    ["1", "-1", "0", "nan", "inf", "1e999", "99999999999999999999", "[]", "{}", '""', "true", "[[1]]"]
)


def table(folder: Path, change: Any) -> object:
    path = folder / "table.json"
    path.write_bytes(text_of({**tuned.header(CPU), "created": "now", "entries": [{"op": "conv"}]}, change))
    return tuned.read(path, CPU)


PROFILE = {"schema": "fastddpm.profile/1", "batches": [{"batch": 1, "status": "ok", "us_per_step": {"median": 1.0}}],
           "ceilings": {"matmul_tflops": {}}}  # fmt: skip


def command(*arguments: str) -> int:
    """Run a command that must be refused, and hold it to one line."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code: Any = main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)
    assert code == 0 or error.getvalue().count("\n") == 1
    return code


def profile(folder: Path, change: Any) -> object:
    path = folder / "p.json"
    path.write_bytes(text_of(PROFILE, change))
    return command("profile", "--compare", str(path), str(path))


NOWHERE = ("--model", "nowhere")
# Commands that end before they do anything, whatever their options are.
COMMANDS = {
    "sample": ("nowhere",), "merge": ("nowhere", "a.npz"), "edit": ("3", *NOWHERE), "inpaint": ("3", *NOWHERE),
    "interpolate": ("3", "4", *NOWHERE), "upscale": ("3", *NOWHERE), "train": ("nowhere",), "info": NOWHERE,
    "evaluate": ("nowhere", "nowhere"), "profile": ("nowhere",), "tune": ("nowhere", "--device", "cpu"),
}  # fmt: skip
_parsers: Any = next(action.choices for action in _parser()._actions if isinstance(action.choices, dict))
OPTIONS = {
    name: sorted(
        {option for action in _parsers[name]._actions for option in action.option_strings} - {"--model", "--clear"}
    )
    for name in COMMANDS
}


def arguments(folder: Path, given: tuple[str, list[tuple[int, str]]]) -> object:
    name, places = given
    options = ((OPTIONS[name][place % len(OPTIONS[name])], value) for place, value in places)
    return command(name, *COMMANDS[name], *(word for pair in options for word in pair))


_values = (
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    str(2**64),
    "9" * 30,
    "1,2",
    ",",
    "1,,2",
    "none",
    "auto",
    "cpu",
    "cuda:99",
    "a\nb",
    "\udcff",
    "'",
    '"',
    "\u0663",
    ".png",
    "x.png",
    "a.npz",
    "/",
    "..",
    "a=b",
    "[1]",
)
_given = st.sampled_from(_values) | st.text("09-.,eainf =[]'\n\u00e9", max_size=6)
_arguments = st.tuples(st.sampled_from(sorted(COMMANDS)), st.lists(st.tuples(st.integers(0, 99), _given), max_size=3))


_state = st.dictionaries(_names, _tensor | st.integers() | st.text(max_size=3), max_size=6)
_fields = CONFIG | dict.fromkeys(("time_embedding_dim", "freq_shift", "num_class_embeds", "attention_head_dim"))
_settings = (
    *("_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "clip_sample"),
    *("clip_sample_range", "prediction_type", "variance_type", "timestep_spacing", "steps_offset", "thresholding"),
    "rescale_betas_zero_snr",
)


def kinds(*names: str) -> st.SearchStrategy[Any]:
    """Edits of one of several files."""
    return st.tuples(st.sampled_from(names), edits)


LOADERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], object]]] = {
    "unet config": (changed(_fields), pipeline("unet/config.json")),
    "model index": (changed(["unet", "scheduler", "vqvae", "_class_name", "_labels"]), pipeline("model_index.json")),
    "safetensors": (edits, pipeline(f"{WEIGHTS}.safetensors")),
    "scheduler config": (changed(_settings), scheduler),
    "torch file": (kinds("zip", "pickle"), torch_file),
    "pickle": (st.one_of(_calls, st.lists(_calls, max_size=2), odd), pickled),
    "trainer file": (
        st.fixed_dictionaries({"model": _state}) | st.dictionaries(st.sampled_from(["model", "ema"]), odd),
        trainer_file,
    ),
    "guided-diffusion": (
        st.tuples(
            st.dictionaries(st.integers(0, 99).map(str), _tensor, max_size=2),
            st.dictionaries(st.sampled_from([*FLAGS, "learn_sigma", "num_heads", "class_cond"]), _odd, max_size=2),
        ),
        guided,
    ),
    "archive": (kinds("stored", "deflated", "npy", "bzip2", "members"), archive),
    "picture": (kinds("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"), picture),
    "shards": (
        st.one_of(
            st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(["first", "last"]), edits),
            st.tuples(
                st.sampled_from(list(FORMATS)),
                st.just("manifest"),
                changed(["kind", "schema", "num_samples", "shard_size", "format", "sample", "class_labels"]),
            ),
        ),
        shard,
    ),
    "checkpoint": (
        st.one_of(
            st.tuples(st.sampled_from(["diffusion.safetensors", "training.pt"]), edits),
            st.tuples(st.sampled_from(["manifest.json", "state.json"]), changed(["step", "files", "b"])),
        ),
        checkpoint,
    ),
    "run log": (edits, run_log),
    "toml": (
        st.sampled_from([10, 1000, 100_000])
        | st.tuples(st.sampled_from(["data", "model", "diffusion", "trainer", "x"]), _keys, st.one_of(_toml, edits)),
        toml,
    ),
    "tuned table": (changed(["schema", "device", "entries", "native", "created"]), table),
    "profile": (changed(["schema", "batches", "ceilings", "device"]), profile),
    "command line": (_arguments, arguments),
}
