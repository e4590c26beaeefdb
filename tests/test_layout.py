"""The rooms' order, the absence of circles, and imports that need neither triton, a compiler nor CUDA."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp

import fastddpm

ROOT = Path(__file__).parents[1]


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "fastddpm", "fastddpm_kernels",
        include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None,
    )  # fmt: skip


def test_contracts() -> None:
    """`lint-imports` finds that all contracts of pyproject.toml are kept: the order of rooms, kernels apart."""
    # In a process of its own: it configures logging, and so disables the loggers that other tests listen to.
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_module_imports_itself_by_way_of_others() -> None:
    """No circle exists anywhere, within rooms and between a package and its modules too."""
    circles = set()
    for module in graph().modules:
        for imported in graph().find_modules_directly_imported_by(module):
            if back := graph().find_shortest_chain(imported, module):
                circles.add(" -> ".join([module, *back]))
    assert not circles, "\n".join(sorted(circles, key=len))


def test_only_device_code_imports_triton() -> None:
    importers = graph().find_modules_that_directly_import("triton")
    assert importers, "grimp saw no import of triton"
    for module in importers:
        assert module.startswith("fastddpm_kernels."), module
        assert ".device." in module or module.rpartition(".")[2].startswith("triton"), module


def test_no_room_imports_the_whole_package() -> None:
    assert graph().find_modules_that_directly_import("fastddpm") <= {"fastddpm.__main__"}


NAMED_TUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}  # are public in spite of the underscore


def private_names(source: str) -> set[str]:
    """Return the private names of `fastddpm_kernels` that a module imports, or reads from a module of it."""
    tree, found, bound = ast.parse(source), set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastddpm_kernels":
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            bound |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.endswith("__")} - NAMED_TUPLES


def test_private_names_are_seen() -> None:
    assert private_names("from fastddpm_kernels.conv import _cost, pack as _pack") == {"_cost"}
    assert private_names("from fastddpm_kernels import tuned as t\nt._cache, t.read, t.__name__") == {"_cache"}


def test_no_private_name_of_the_kernels_is_used() -> None:
    files = Path(fastddpm.__file__).parent.rglob("*.py")
    found = {path.name: names for path in files if (names := private_names(path.read_text(encoding="utf-8")))}
    assert not found


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
