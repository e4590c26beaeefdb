"""A U-Net's folder: config.json and weights, in one file or in shards, as diffusers writes and reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddpm.common.files import atomic_write, read_json, read_weights, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
OLD_WEIGHTS_FILE = "diffusion_pytorch_model.bin"

# What old versions of diffusers called the attention's linear layers.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_JOINED = ".to_qkv."
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.(?:safetensors|bin)$)")


def weights_files(variant: str | None = None) -> tuple[str, str]:
    """What the files of weights are called, the one that is preferred first."""
    if variant is None:
        return WEIGHTS_FILE, OLD_WEIGHTS_FILE
    new, old = (f".{variant}.".join(name.rsplit(".", 1)) for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE))
    return new, old


def index_files(variant: str | None = None) -> tuple[str, str]:
    """What the files are called that say which shard holds which weight; in the order of `weights_files`."""
    more = "" if variant is None else f".{variant}"
    return f"{WEIGHTS_FILE}.index{more}.json", f"{OLD_WEIGHTS_FILE}.index{more}.json"


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists.

    Raises:
        ValueError: it is no index, or lists files elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names of files")
    names = sorted(set(weight_map.values()))
    if away := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} lists {away[0]}, must list files of its own folder")
    return names


def read(folder: Path, variant: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Read the weights of a folder, with the names of today.

    Returns:
        The file, or the index of several, and the weights by name.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: a file cannot be read.
    """
    for name, index in zip(weights_files(variant), index_files(variant), strict=True):
        if (folder / name).is_file():
            state = read_weights(folder / name)
            return folder / name, apart({_new_name(key): tensor for key, tensor in state.items()})
        if (folder / index).is_file():
            state = {}
            for shard in shards_of(folder / index):
                if not (folder / shard).is_file():
                    raise FileNotFoundError(f"{folder} has no {shard}, which {index} lists")
                state.update(read_weights(folder / shard))
            return folder / index, apart({_new_name(key): tensor for key, tensor in state.items()})
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(weights_files(variant))}")


def write(
    folder: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    variant: str | None,
    max_shard_size: int | str,
    safe_serialization: bool,
) -> None:
    """Write a U-Net's folder; see `UNet.save_pretrained`. Weights of the same variant that lie there are replaced."""
    place = 0 if safe_serialization else 1
    name, index = weights_files(variant)[place], index_files(variant)[place]
    shards = _split(state, bytes_of(max_shard_size))
    names = [name]
    if len(shards) > 1:
        stem, _, ending = name.rpartition(".")
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{ending}" for i in range(len(shards))]
    save = partial(save_file, metadata={"format": "pt"}) if safe_serialization else torch.save
    for file, shard in zip(names, shards, strict=True):
        atomic_write(folder / file, partial(save, shard))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / CONFIG_FILE, config)
    # What an earlier save left would be read in place of this, or beside it.
    for old in folder.iterdir():
        if old.name not in names and (_SHARD.sub("", old.name) == name or (old.name == index and len(shards) == 1)):
            old.unlink()


def bytes_of(size: int | str) -> int:
    """Return a number of bytes, of a number or of text such as "10GB" or "1.5 MiB".

    Raises:
        ValueError: it is no positive size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}, must be a positive number of bytes or such as '200MB'")
    base = 1024 if match[3] else 1000
    return max(int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")), 1)


def apart(state: dict[str, Tensor], joined: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return weights with queries, keys and values in layers of their own, as files hold them.

    Where a layer has both, the joined one counts if it is among `joined`, else the separate ones, as in diffusers.
    """
    joined = set(joined)
    result = {name: tensor for name, tensor in state.items() if _JOINED not in name}
    for name, tensor in state.items():
        if _JOINED in name:
            layer, _, leaf = name.partition(_JOINED)
            if layer in joined or f"{layer}.to_q.{leaf}" not in result:
                for which, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                    result[f"{layer}.{which}.{leaf}"] = part
    return result


def _split(state: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Distribute weights, in order, over as many shards as `size` bytes need; one that is larger has its own."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in state.items():
        if shards[-1] and held + tensor.nbytes > size:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards


def _new_name(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name
