"""Proofs that pass, and proofs that fail in every way: the child process of `test_proving`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator

import torch
from fastddpm_kernels.proof import Proof, main


def _raise() -> tuple[float, float]:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def _crash() -> tuple[float, float]:
    print("what a library prints goes elsewhere", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0, 1.0


def _hang() -> tuple[float, float]:
    time.sleep(600)
    return 0.0, 1.0


def proofs(device: torch.device, options: argparse.Namespace) -> Iterator[Proof]:
    """Yield a proof of every fate."""
    yield Proof("first", "passes", lambda: (0.5, 1.0))
    yield Proof("second", "is wrong", lambda: (2.0, 1.0))
    yield Proof("third", "is not a number", lambda: (float("inf"), 1.0))
    yield Proof("fourth", "raises", _raise)
    yield Proof("fifth", "crashes", _crash)
    yield Proof("sixth", "hangs", _hang)
    yield Proof("seventh", "passes", lambda: (0.0, 0.0))


if __name__ == "__main__":
    main(proofs)
