"""Describe what decides the samples of a job as plain values, for its manifest and to tell jobs apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.common.version import __version__
from fastddpm.sampling.sampler import Sampler


def model_identity(model: Callable[..., Any], config: Any) -> dict[str, Any]:
    """Return the SHA-256 of a model's weights and of its config, and the name of its class.

    Raises:
        TypeError: it is not a module, so it cannot be told from another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, must be an nn.Module: others have no weights to tell apart"
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    kind = type(model)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config_sha256": hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }


def _plain(value: Any) -> Any:
    """Return `value` as a JSON value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)  # not its repr, which holds an address
    try:
        return _plain(vars(value))
    except TypeError:
        return str(value)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data


def sampler_identity(sampler: Sampler) -> dict[str, Any]:
    """Return a sampler's settings by name, with its table as the hash of its rows."""
    table, settings = sampler.table, sampler.settings
    digest = hashlib.sha256()
    for tensor in (table.timesteps, table.rows, table.log_variance, table.levels, table.needs_network, table.mean_std):
        if tensor is not None:
            digest.update(_bytes(tensor.cpu().numpy()))
    digest.update(repr((table.start, table.learned, table.shifts)).encode())
    frozen = sampler.network.frozen
    stored = None if frozen is None else frozen.weight_dtype
    classifier = settings.classifier
    return {
        "method": sampler.method,
        "steps": len(table),
        "timesteps_sha256": hashlib.sha256(_bytes(table.timesteps.cpu().numpy())).hexdigest(),
        "prediction_type": sampler.prediction_type,
        "variance_type": sampler.variance_type,
        "guidance_scale": sampler.guidance_scale,
        "guidance_rescale": settings.guidance_rescale,
        "guidance_interval": _plain(settings.guidance_interval),
        "null_class": settings.null_class,
        "clip_range": settings.clip_range,
        "thresholding": None if settings.threshold is None else _plain(settings.threshold),
        "classifier": None if classifier is None else _plain(classifier),
        "self_condition": settings.self_condition,
        "coefficients_sha256": digest.hexdigest(),
        "tf32": sampler._tf32 is True,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        "backend": sampler.backend,
        "network_backend": None if frozen is None else frozen.backend,
        **({} if stored is None else {"weight_dtype": str(stored).removeprefix("torch.")}),
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that draws."""
    return {
        "fastddpm": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def labels_identity(labels: np.ndarray | None) -> dict[str, Any] | None:
    """Return an identity of the labels of a job."""
    if labels is None:
        return None
    return {"sha256": hashlib.sha256(_bytes(labels)).hexdigest(), "classes": len(np.unique(labels))}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return the first difference of two manifests, as `name was x, is y`; versions are not compared."""
    for name in [*old, *(each for each in new if each not in old)]:
        if name == "versions":
            continue
        mine, other = new.get(name), old.get(name)
        if mine == other:
            continue
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            return difference(other, mine, f"{prefix}{name}.")
        return f"{prefix}{name} was {_short(other)}, is {_short(mine)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:13]}..." if isinstance(value, str) and len(value) == 64 else text
