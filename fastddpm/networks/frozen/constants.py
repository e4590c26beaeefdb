"""The weights of a frozen U-Net."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastddpm_kernels.native.memory import empty
from torch import Tensor


class Constants:
    """Weights as the instructions read them, by name. Refilling them keeps their memory.

    Attributes:
        refilling: whether `put` overwrites the weights it has, and only these.
        complete: whether the U-Net's own weights are released, so that nothing can be added.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.refilling = self.complete = False
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, values: Tensor | Callable[[], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Store and return `values`, or what they return, in the compute dtype (or `dtype`).

        [.., .., kh, kw] is stored channels-last.
        """
        tensor = self.tensors.get(name)
        if tensor is not None and not self.refilling:
            return tensor
        self._check(name)
        values = (values if isinstance(values, Tensor) else values()).detach()
        if tensor is None and self.refilling:  # of a form that nothing has read
            return values
        if tensor is None:
            dtype = dtype or self.dtype
            if values.ndim == 1 and self.device.type == "cpu":
                tensor = empty(values.shape, dtype).copy_(values)
            else:
                order = torch.channels_last if values.ndim == 4 else torch.contiguous_format
                tensor = values.to(self.device, dtype, copy=True).contiguous(memory_format=order)
            self.tensors[name] = tensor
        else:
            tensor.copy_(values)
        return tensor

    def put_packed(self, name: str, pack: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Store and return what `pack` returns: new memory for None, else the tensor that it is given to overwrite."""
        tensor = self.tensors.get(name)
        if tensor is None or self.refilling:
            self._check(name)
            tensor = self.tensors[name] = pack(tensor)
        return tensor

    def _check(self, name: str) -> None:
        if self.complete:
            raise ValueError(f"the U-Net's weights were released, and {name} is needed in another form for this size")
