"""The shapes that a model runs: what its ops look up while they are bound to a batch, and in one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from fastddpm_kernels import _tuned
from fastddpm_kernels._tuned import Key

from fastddpm.network import Network
from fastddpm.profiling.layers import Evaluation, evaluation

Bound = TypeVar("Bound")
_WHEN_BOUND = ("conv",)  # whose weights are packed for an algorithm; the others are asked at every run


def network_keys(
    network: Network, shape: Sequence[int], ops: Collection[str], precision: str | None = None
) -> dict[Key, int]:
    """How often one evaluation of a network runs each shape of `ops`.

    Args:
        network: a sampler's.
        shape: [N, C, ...] of the batch.
        ops: of `_tuned.FIELDS`.
        precision: the network's, by name, for what float32 products are rounded to.
    """
    frozen = network.frozen
    labels = None if frozen is None else frozen.blueprint.some_labels(shape[0], network.device)

    def run(ready: Evaluation) -> None:
        with ready.running():
            ready()

    return recorded(lambda: evaluation(network, shape, torch.tensor([0]), labels, precision), run, ops)


def recorded(bind: Callable[[], Bound], run: Callable[[Bound], object], ops: Collection[str]) -> dict[Key, int]:
    """How often `run`, of what `bind` returns, runs each shape of `ops`."""
    with _tuned.recording() as when_bound:
        bound = bind()
    with _tuned.recording() as when_run:
        run(bound)
    found = {key: count for key, count in when_bound.items() if key.op in _WHEN_BOUND}
    for key, count in when_run.items():
        found[key] = found.get(key, 0) + count
    return {key: count for key, count in found.items() if key.op in ops}
