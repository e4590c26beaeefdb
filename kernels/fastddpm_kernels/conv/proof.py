"""The proofs of `conv_`: each native algorithm, at few and at many channels; the ways the GPU's kernel is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.conv import conv_, error_factor, pack
from fastddpm_kernels.conv.examples import Example, results
from fastddpm_kernels.conv.plan import Tile
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("native", "triton")
_ALGORITHMS = {torch.float32: ("winograd4", "winograd2", "direct"), torch.bfloat16: ("winograd2", "direct")}
# Every term at once, split and added up by the last program; and each part in a launch of its own.
_TILES = {
    "one launch": (Example(2, 8, 8, 64, 64, 32, groups=8, shortcut=True), Tile(64, 64, 32, 3)),
    "three launches": (
        Example(5, 4, 4, 64, 64, upsample=True, groups=8), Tile(64, 64, 32, 2, one_launch=False, norm="apply")
    ),
}  # fmt: skip


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    if backend == "triton":
        yield from _of_triton(dtype, device)
        return
    for c, c2, o, size in ((64, 32, 96, 9), (4, 0, 32, 32)):
        shapes = {"x": (2, c, size, size), "weight": (o, c + c2, 3, 3), "bias": (o,), "residual": (2, o, size, size)}
        shapes |= {"x2": (2, c2, size, size)} if c2 else {}
        wide = exact(dtype, device, **shapes)
        for algorithm in _ALGORITHMS[dtype]:

            def run(
                backend: str,
                dtype: torch.dtype,
                wide: dict[str, Tensor] = wide,
                algorithm: str = algorithm,
                c2: int = c2,
            ) -> dict[str, Tensor]:
                values: dict[str, Any] = {name: value.to(dtype) for name, value in wide.items()}
                values = {n: channels_last(v) if v.ndim == 4 and n != "weight" else v for n, v in values.items()}
                weight = values.pop("weight")
                if backend == "native":
                    weight = pack(weight, algorithm, False, dtype=dtype, channels2=c2)
                y = torch.empty_like(values["residual"])
                conv_(y, values.pop("x"), weight, **values, backend=backend)
                return {"y": y}

            factor = 2 * error_factor(algorithm)
            yield of_op("conv", f"{algorithm} {c + c2} to {o} channels", backend, dtype, run, factor)


def _of_triton(dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the triton backend; all of them in float16, in which U-Nets sample."""
    for variant, (example, tile) in list(_TILES.items())[: None if dtype == torch.float16 else 1]:
        values = example.make(lambda name, *shape: exact(dtype, device, value=shape)["value"])
        values = {name: value.to(dtype).double() for name, value in values.items()}

        def run(
            backend: str,
            dtype: torch.dtype,
            example: Example = example,
            tile: Tile = tile,
            values: dict[str, Tensor] = values,
        ) -> dict[str, Tensor]:
            call = example.call(values, dtype)
            if backend == "triton":
                from fastddpm_kernels.conv.triton import Operands, run_tile

                run_tile(Operands(**call), tile)
            else:
                conv_(**call, backend=backend)
            return results(call)

        yield of_op("conv", variant, backend="triton", dtype=dtype, run=run, factor=4.0)
