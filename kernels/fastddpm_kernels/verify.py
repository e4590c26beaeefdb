"""The proofs of all ops: each folder of an op has them in `proof.py`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import torch

from fastddpm_kernels import native
from fastddpm_kernels.backend import OPS
from fastddpm_kernels.proof import Proof, main


def proofs(
    device: torch.device, options: argparse.Namespace | None = None, backend: str | None = None
) -> Iterator[Proof]:
    """Yield the proofs of every op that has a kernel for the device, in the dtypes it is used in.

    `backend` is the device's own, unless Triton's interpreter is to run its kernels on a CPU.
    """
    backend = backend or ("native" if device.type == "cpu" else "triton")
    dtypes = [torch.float32]
    if backend == "triton":
        dtypes += [torch.float16, torch.bfloat16]
    elif native.why_not_bfloat16(slower=True) is None:
        dtypes.append(torch.bfloat16)
    for op in OPS:
        of_op = importlib.import_module(f"fastddpm_kernels.{op}.proof")
        if backend in of_op.BACKENDS:
            for dtype in dtypes:
                yield from of_op.proofs(backend, dtype, device)


if __name__ == "__main__":
    main(proofs)
