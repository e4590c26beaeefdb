"""Ops in place: called, they run once; bound, their checks, look-ups and conversions run once for many runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec

import torch

P = ParamSpec("P")


class InPlace(Generic[P]):
    """An op that writes to given tensors, made of a function that checks them and returns what then runs the op.

    `op(y, x, ...)` runs it. `op.bind(y, x, ...)`, with the same arguments, returns a function without arguments that
    runs it each time it is called, on the values that the tensors then hold: the values may change between runs, the
    memory may not. Neither is differentiable.
    """

    def __init__(self, bind: Callable[P, Callable[[], object]]) -> None:
        functools.update_wrapper(self, bind)
        self.bind = bind

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        with torch.no_grad():
            self.bind(*args, **kwargs)()
