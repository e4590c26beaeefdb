"""Read and write a U-Net's folder as diffusers does: config.json and the weights, in one file or in shards."""

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

# The names of the attention's linear layers in old versions of diffusers, and today's.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_JOINED = ".to_qkv."
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.(?:safetensors|bin)$)")


def weights_files(variant: str | None = None) -> tuple[str, str]:
    """Return the names that a file of weights may have, the preferred one first."""
    if variant is None:
        return WEIGHTS_FILE, OLD_WEIGHTS_FILE
    new, old = (f".{variant}.".join(name.rsplit(".", 1)) for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE))
    return new, old


def index_files(variant: str | None = None) -> tuple[str, str]:
    """Return the names of the index files, which say which shard holds a weight, in the order of `weights_files`."""
    more = "" if variant is None else f".{variant}"
    return f"{WEIGHTS_FILE}.index{more}.json", f"{OLD_WEIGHTS_FILE}.index{more}.json"


def shards(index: Path) -> list[str]:
    """Return the names of the files that hold sharded weights.

    Raises:
        FileNotFoundError, ValueError: the index is missing or is not a valid one; the message names it.
    """
    places = read_json(index).get("weight_map")
    names = sorted(set(places.values()), key=str) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name, for each tensor, a file beside it")
    return names


def read(folder: Path, variant: str | None) -> tuple[Path, dict[str, Tensor]]:
    """Return the path of the weights, or of the index of their shards, and the tensors under today's names.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file cannot be read.
    """
    names = weights_files(variant)
    for name, index in zip(names, index_files(variant), strict=True):
        path = folder / name if (folder / name).is_file() else folder / index
        if path.is_file():
            parts = [path] if path.name == name else [folder / shard for shard in shards(path)]
            state: dict[str, Tensor] = {}
            for part in parts:
                if not part.is_file():
                    raise FileNotFoundError(f"{part} is missing, which {index} lists")
                state |= {_new_name(key): tensor for key, tensor in read_weights(part).items()}
            return path, apart(state)
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(names)}, whole or in shards")


def write(
    folder: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    variant: str | None,
    max_shard_size: int | str,
    safe_serialization: bool,
) -> None:
    """Write a U-Net's folder, and replace weights of the same variant in it; see `UNet.save_pretrained`."""
    place = 0 if safe_serialization else 1
    name, index = weights_files(variant)[place], index_files(variant)[place]
    parts = _split(state, bytes_of(max_shard_size))
    names = [name]
    if len(parts) > 1:
        stem, _, ending = name.rpartition(".")
        names = [f"{stem}-{i + 1:05}-of-{len(parts):05}.{ending}" for i in range(len(parts))]
    save = partial(save_file, metadata={"format": "pt"}) if safe_serialization else torch.save
    for file, part in zip(names, parts, strict=True):
        atomic_write(folder / file, partial(save, part))
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / CONFIG_FILE, config)
    # `read` would take the files of an earlier save in place of these, or along with them.
    for old in folder.iterdir():
        if old.name not in names and (_SHARD.sub("", old.name) == name or (old.name == index and len(parts) == 1)):
            old.unlink()


def bytes_of(size: int | str) -> int:
    """Return a size in bytes, given as a number or as text such as "10GB" or "1.5 MiB".

    Raises:
        ValueError: `size` is not a positive size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}, must be a positive number of bytes or such as '200MB'")
    base = 1024 if match[3] else 1000
    return max(int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")), 1)


def apart(state: dict[str, Tensor], joined: Iterable[str] = ()) -> dict[str, Tensor]:
    """Split joined layers of queries, keys and values, and return the weights as files hold them.

    Where a layer has both forms, the joined one is used if the layer is in `joined`, else the separate ones, as in
    diffusers.
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
    """Distribute weights, in order, over shards of at most `size` bytes; a larger weight gets a shard of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in state.items():
        if parts[-1] and held + tensor.nbytes > size:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += tensor.nbytes
    return parts


def _new_name(name: str) -> str:
    match = _OLD_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" if match else name
