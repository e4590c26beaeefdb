"""A proof: an op on a backend, compared with its reference in float64."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm_kernels.testing import FLOORS, errors

Run = Callable[[str, torch.dtype], dict[str, Tensor]]


class Proof(NamedTuple):
    """One proof.

    Attributes:
        op, variant: as in `Verdict`.
        check: returns the error and its bound, or raises.
    """

    op: str
    variant: str
    check: Callable[[], tuple[float, float]]

    @property
    def name(self) -> str:
        return f"{self.op}: {self.variant}"


def of_op(op: str, variant: str, backend: str, dtype: torch.dtype, run: Run, factor: float = 2.0) -> Proof:
    """Return the proof that a backend loses at most `factor` times what plain torch loses in the same dtype.

    Args:
        op, variant: as in `Verdict`; the dtype is added to the variant.
        backend: "triton" or "native".
        dtype: of the operands, which must be exact in it.
        run: calls the op on a backend with operands of a dtype, and returns its results by name.
        factor: of eager's error.
    """

    def check() -> tuple[float, float]:
        truth, plain, actual = run("reference", torch.float64), run("eager", dtype), run(backend, dtype)
        worst, allowed = 0.0, FLOORS[dtype][1]
        for name, value in truth.items():
            if actual[name].shape != value.shape:
                raise AssertionError(f"{name} has shape {tuple(actual[name].shape)}, must have {tuple(value.shape)}")
            bound = max(FLOORS[dtype][1], factor * errors(plain[name], value)[1])
            error = errors(actual[name], value)[1]
            if error / bound >= worst / allowed:
                worst, allowed = error, bound
        return worst, allowed

    return Proof(op, f"{variant} {str(dtype).removeprefix('torch.')}", check)


def exact(dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return random numbers in float64 that are exact in `dtype`, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: value.to(device).double() for name, value in values.items()}


def channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] channels-last."""
    return x.contiguous(memory_format=torch.channels_last)


def main(
    proofs: Callable[..., Iterator[Proof]], configure: Callable[[argparse.ArgumentParser], object] | None = None
) -> None:
    """Run proofs as the child of `proving.run`: tell on the pipe which one begins, and its verdict.

    Args:
        proofs: takes the device and the parsed options.
        configure: adds options.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--skip", type=json.loads, default=[])
    parser.add_argument("--pipe", type=int, required=True)
    if configure is not None:
        configure(parser)
    options = parser.parse_args()

    def tell(**message: Any) -> None:
        os.write(options.pipe, json.dumps(message).encode() + b"\n")

    found: Sequence[Proof] = list(proofs(options.device, options))
    tell(names=[proof.name for proof in found])
    for proof in found:
        if proof.name not in options.skip:
            tell(start=proof.name)
            tell(name=proof.name, verdict=_verdict(proof))


def _verdict(proof: Proof) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        error, bound = proof.check()
    except Exception as raised:  # a kernel that cannot be used, whatever the reason
        said = (str(raised).strip().splitlines() or [""])[0]
        result: dict[str, Any] = {"verdict": "raised", "message": f"{type(raised).__name__}: {said}"[:300]}
    else:
        result = {"verdict": "passed" if error <= bound else "wrong", "error": min(error, 1e30), "bound": bound}
    return result | {"seconds": round(time.perf_counter() - begin, 3)}
