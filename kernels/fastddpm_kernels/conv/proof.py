"""The proofs of `conv_`: each native algorithm, at few and at many channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.conv import conv_, error_factor, pack
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("native",)
_ALGORITHMS = {torch.float32: ("winograd4", "winograd2", "direct"), torch.bfloat16: ("winograd2", "direct")}


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
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
