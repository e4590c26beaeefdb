"""The weights of a frozen U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels.native.pages import HugePages
from torch import Tensor

_MANY = 4096  # values of a vector that is no bias: packed weights


class Constants:
    """Weights as the instructions read them, by name. Refilling them keeps their memory.

    Attributes:
        refilling: whether `put` overwrites the weights it has.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.refilling = False
        self.tensors: dict[str, Tensor] = {}
        self._pages = HugePages() if device.type == "cpu" else None

    def put(
        self, name: str, values: Tensor | Callable[[], Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Store and return `values`, or what they return, in the compute dtype (or `dtype`).

        [.., .., kh, kw] is stored channels-last.
        """
        tensor = self.tensors.get(name)
        if tensor is not None and not self.refilling:
            return tensor
        values = (values if isinstance(values, Tensor) else values()).detach()
        if tensor is None:
            order = torch.channels_last if values.ndim == 4 else torch.contiguous_format
            if self._pages is not None and values.ndim == 1 and values.numel() >= _MANY:
                tensor = self._pages.empty((values.numel(),), dtype or self.dtype).copy_(values)
                self.tensors[name] = tensor
                return tensor
            tensor = values.to(self.device, dtype or self.dtype, copy=True).contiguous(memory_format=order)
            self.tensors[name] = tensor
        else:
            tensor.copy_(values)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # What lies in a block with others would be copied with all of it.
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return vars(self) | {"tensors": tensors, "_pages": None}
