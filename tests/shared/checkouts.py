"""The libraries themselves, from checkouts of their repositories that variables name.

    FASTDDPM_EDM                of NVlabs/edm
    FASTDDPM_PHYSICSNEMO        of NVIDIA/physicsnemo
    FASTDDPM_LEROBOT            of huggingface/lerobot, its folder `src`
    FASTDDPM_DIFFUSION_POLICY   of real-stanford/diffusion_policy

    FASTDDPM_EDM=~/edm pytest tests/interop/test_checkouts.py

Their packages need much that their networks do not: that is empty where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn


def folder_of(variable: str) -> Path:
    """Return the folder that a variable names; skip the test if it names none."""
    if not (value := os.environ.get(variable)):
        pytest.skip(f"{variable} names no checkout")
    return Path(value).expanduser()


def load(folder: Path, module: str, *, bare: Sequence[str] = (), empty: Sequence[str] = ()) -> Any:
    """Import a module of a checkout.

    Args:
        folder: that holds its package.
        module: its full name.
        bare: packages whose `__init__` is left out, since it imports all of the library.
        empty: modules that it imports and its network does not use.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for name in bare:
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder.joinpath(*name.split(".")))]
            sys.modules[name] = package
    with _empty_ones(empty):
        return importlib.import_module(module)


def diffusion_policy() -> Any:
    """Return the module of `ConditionalUnet1D`."""
    return load(folder_of("FASTDDPM_DIFFUSION_POLICY"), "diffusion_policy.model.diffusion.conditional_unet1d")


def lerobot() -> Any:
    """Return the module of `DiffusionConditionalUnet1d`."""
    package = "lerobot.policies.diffusion"
    return load(
        folder_of("FASTDDPM_LEROBOT"), f"{package}.modeling_diffusion",
        bare=("lerobot", "lerobot.policies", package),
        empty=("lerobot.utils", "lerobot.policies.pretrained", "lerobot.policies.utils", "torchvision",
               f"{package}.configuration_diffusion"),
    )  # fmt: skip


def edm(module: str = "training.networks") -> Any:
    """Return a module of EDM."""
    return load(folder_of("FASTDDPM_EDM"), module)


def physicsnemo(module: str) -> Any:
    """Return a module of PhysicsNeMo."""
    packages = (
        "core",
        "models",
        "diffusion",
        "diffusion.preconditioners",
        "diffusion.samplers",
    )
    return load(
        folder_of("FASTDDPM_PHYSICSNEMO"), f"physicsnemo.{module}",
        bare=("physicsnemo", *(f"physicsnemo.{name}" for name in packages)),
        empty=("physicsnemo.diffusion.multi_diffusion", "apex", "cftime", "h5py", "jaxtyping", "nvtx", "s3fs",
               "tensordict", "termcolor", "timm", "transformer_engine", "treelib", "warp", "zarr"),
    )  # fmt: skip


class _Empty(types.ModuleType):
    """A module that has every name: classes that may be base classes, constants that are False."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() and not name.isupper():
            return type(name, (nn.Module,), {"__class_getitem__": classmethod(lambda cls, _: cls)})
        return False if name.isupper() else _unchanged


def _unchanged(*arguments: Any, **named: Any) -> Any:
    """Return what is decorated, or a decorator that does so."""
    return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not named else _unchanged


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds some modules, and what is in them, where they are not loaded already."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = any(name == each or name.startswith(f"{each}.") for each in self._names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""


@contextmanager
def _empty_ones(names: Sequence[str]) -> Iterator[None]:
    absent = [name for name in names if "." in name or importlib.util.find_spec(name) is None]
    finder, before = _Finder(absent), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Empty):
                del sys.modules[name]
