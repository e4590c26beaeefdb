"""A sampler that costs nothing, and what a folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from unets import TINY

from fastddpm import NoiseSchedule, Sampler, UNet, load_pretrained, save_pretrained

Contents = dict[str, bytes]


def tiny_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(**TINY, num_class_embeds=3)


@pytest.fixture
def sampler() -> Sampler:
    """Two steps on 8 x 8 pixels, three classes."""
    return Sampler(tiny_unet(), NoiseSchedule.linear(), method="ddim", num_inference_steps=2)


@pytest.fixture(scope="session")
def digits_sampler() -> Sampler:
    return load_pretrained().sampler(method="ddim", num_inference_steps=2)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A pipeline folder of the tiny model."""
    save_pretrained(tmp_path / "model", tiny_unet(), NoiseSchedule.linear())
    return str(tmp_path / "model")


@pytest.fixture
def contents() -> Callable[[Path], Contents]:
    """What a folder holds, by name: every file, hidden ones too."""

    def read(folder: Path) -> Contents:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture
def command() -> Callable[..., subprocess.Popen[str]]:
    """Start `fastddpm`, or another module, in a process of its own."""

    def start(*arguments: str, module: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *module, *(("-m",) if module else ()), "fastddpm", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
