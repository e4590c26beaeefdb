"""The proofs of `attention_block_`: one block of pixels and several, whole channels and tails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.attention_block import attention_block_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    for channels, size, groups in ((256, 16, 32), (256, 4, 32), (512, 8, 32), (96, 9, 8)):
        matrix, vector = (channels, channels), (channels,)
        wide = exact(
            dtype, device, x=(2, channels, size, size), weight=vector, bias=vector, scores=matrix, scores_bias=vector,
            values=matrix, values_bias=vector,
        )  # fmt: skip
        # Scores of a few units: their softmax is neither flat nor one pixel alone.
        wide = {name: value / (channels if name == "scores" else 1) for name, value in wide.items()}

        def run(
            backend: str, dtype: torch.dtype, wide: dict[str, Tensor] = wide, groups: int = groups
        ) -> dict[str, Tensor]:
            own: dict[str, Any] = {name: value.to(dtype) for name, value in wide.items()}
            x = channels_last(own.pop("x"))
            y = torch.empty_like(x)
            weight, bias = own.pop("weight").float(), own.pop("bias").float()
            attention_block_(y, x, weight, bias, groups, **own, backend=backend)
            return {"y": y}

        yield of_op("attention_block", f"{channels} channels, {size}x{size}", backend, dtype, run)
