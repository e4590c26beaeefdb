"""Prove a model's network and its CUDA graphs on a device: a child process of `fastddpm_kernels.proving`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from fastddpm_kernels.proof import Proof, main
from fastddpm_kernels.proving import Suite

from fastddpm.interop.pretrained import load_pretrained
from fastddpm.sampling.verify import proofs_of

SUITE = Suite("fastddpm.perf.verify")


def proofs(device: torch.device, options: argparse.Namespace) -> Iterator[Proof]:
    """Yield the proofs of the model `options.model`."""
    return proofs_of(load_pretrained(options.model).unet.eval(), device)


if __name__ == "__main__":
    main(proofs, lambda parser: parser.add_argument("--model", required=True))
