"""Provide in-place ops: a call runs once; a bound op checks, looks up and converts once for many runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec

import torch

P = ParamSpec("P")


class InPlace(Generic[P]):
    """An op that writes to given tensors, made from a function that checks them and returns a runner.

    `op(y, x, ...)` runs it. `op.bind(y, x, ...)` takes the same arguments and returns a function without arguments.
    Each call of that function runs the op on the current values of the tensors: values may change between runs, the
    memory may not. Neither form is differentiable.
    """

    def __init__(self, bind: Callable[P, Callable[[], object]]) -> None:
        functools.update_wrapper(self, bind)
        self.bind = bind

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        with torch.no_grad():
            self.bind(*args, **kwargs)()
