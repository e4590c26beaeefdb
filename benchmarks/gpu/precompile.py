"""Compiles the kernels of a loop into Triton's cache on disk: python -m gpu.precompile NETWORK DTYPE BATCH.

One process compiles one kernel after the other; `gpu_check.py` runs many of these at once before loops are timed.
"""

from __future__ import annotations

import sys

import torch
from networks import make_problem

from fastddpm import Sampler

# Every loop and network of ours that is timed, the main precision first.
JOBS = [
    [network, dtype, str(batch)]
    for dtype in ("float16", "float32", "bfloat16", "tf32")
    for network, batches in (("cifar10", (1, 8, 64, 256, 1024)), ("celeba256", (1, 8, 32)))
    for batch in batches
    if dtype == "float16" or (network == "cifar10" and batch in (1, 256))
]


def main(network: str, dtype: str, batch: str) -> None:
    """Run two steps, which have every kernel; cuDNN's search, which no other process could use, tries one plan."""
    torch.backends.cudnn.benchmark_limit = 1
    problem = make_problem(network, torch.device("cuda"))
    Sampler(problem.unet, problem.schedule, "ddpm", 2, dtype=dtype, cuda_graph=False).sample(int(batch))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
