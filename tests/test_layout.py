"""Imports point one way, and need neither triton, a compiler nor CUDA."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastddpm_kernels
import pytest

import fastddpm

PACKAGES = {"fastddpm": Path(fastddpm.__file__).parent, "fastddpm_kernels": Path(fastddpm_kernels.__file__).parent}
FILES = [(name, path) for name, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))]

# A module imports only modules of its own package that stand before it here.
ORDER = [
    "_files",
    "progress",
    "checks",
    "hub",
    "timesteps",
    "schedule",
    "scheduler_config",
    "coefficients",
    "solvers",
    "images",
    "layers",
    "unet_config",
    "unet",
    "precision",
    "weights",
    "frozen",
    "network",
    "diffusion",
    "overflow",
    "guidance",
    "settings",
    "batch",
    "trajectory",
    "cuda_graph",
    "profiling",
    "engine",
    "tuning",
    "sampler",
    "evaluation",
    "editing",
    "fusing",
    "interop",
    "pretrained",
    "training",
    "__init__",
    "cli",
    "__main__",
]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_only_device_code_imports_triton(package: str, path: Path) -> None:
    if path.parent.name != "device" and not path.name.startswith("triton"):
        assert not {name for name in imported(path) if name.split(".")[0] == "triton"}


def test_kernels_know_nothing_of_models() -> None:
    for package, path in FILES:
        if package == "fastddpm_kernels":
            assert not {name for name in imported(path) if name.split(".")[0] == "fastddpm"}, path


def test_order_of_modules() -> None:
    root = PACKAGES["fastddpm"]
    files = {path.stem: [path] for path in root.glob("*.py")}
    files |= {path.parent.name: list(path.parent.glob("*.py")) for path in root.glob("*/__init__.py")}
    assert sorted(ORDER) == sorted(files), "ORDER must name every module"
    for module, paths in files.items():
        for path in paths:
            names = {name.split(".")[1] for name in imported(path) if name.startswith("fastddpm.")} & set(ORDER)
            names.discard(module if len(paths) > 1 else "")  # within a package
            later = {name for name in names if ORDER.index(name) >= ORDER.index(module)}
            assert not later, f"{path} imports {later}"


def test_files_can_be_read_in_a_sitting() -> None:
    long = {
        path.name: count for _, path in FILES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


WITHOUT = """
import sys
for name in ("triton", "triton.language", "cuda", "cuda.bindings", "diffusers", "denoising_diffusion_pytorch",
             "accelerate", "torch_fidelity", "huggingface_hub", "matplotlib", "sklearn"):
    sys.modules[name] = None  # importing it raises ImportError
import os
os.environ["PATH"] = ""  # no compiler
import torch, fastddpm, fastddpm_kernels
from fastddpm.sampling.cuda_graph import while_graph
assert while_graph.why_not(torch.device("cuda")).startswith("cuda-bindings cannot be imported")
from fastddpm_kernels import group_norm_silu, philox, pointwise_conv, q_sample, residual_add, reverse_step
from fastddpm_kernels.backend import resolve
assert resolve("q_sample", "auto", "cpu") == "eager"
assert resolve("q_sample", "auto", "cuda") == "eager"
try:
    resolve("q_sample", "triton", "cuda")
except RuntimeError as error:
    assert "triton cannot be imported" in str(error)
else:
    raise AssertionError("triton was chosen")
images = fastddpm.load_pretrained().sampler(num_inference_steps=2).sample(1, class_labels=3)
assert images.shape == (1, 1, 16, 16)
"""


def test_samples_without_triton_a_compiler_and_other_libraries() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


IMPORTING = """
import sys, torch
import fastddpm, fastddpm.interop
try:
    fastddpm.interop.accelerate(1)
except TypeError:
    pass
else:
    raise AssertionError("accelerated 1")
assert not torch.cuda.is_initialized()
imported = {name.split(".")[0] for name in sys.modules}
assert not imported & {"rich", "PIL", "diffusers", "denoising_diffusion_pytorch", "accelerate", "torch_fidelity"}
"""


def test_importing_starts_nothing_and_imports_no_other_library() -> None:
    subprocess.run([sys.executable, "-c", IMPORTING], check=True, timeout=120)
