"""Whether a module's weights have changed, however they were written, and copies that follow them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from fastddpm_kernels import native
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize


def fingerprint(module: nn.Module) -> object:
    """What differs when a parameter or buffer does: their places, how often autograd saw them change, a sum over each.

    Autograd sees neither what is written through `.data` nor inference tensors; the sums do not see permutations (nor,
    on CUDA, signs). On CUDA those of floating-point weights are norms in float64, of all of them by a few kernels; on
    the CPU they are the native library's where it is loaded, which is there sooner than torch's.
    """
    weights = list(_tensors(module))
    seen = tuple((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights)
    by_device: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        by_device.setdefault(weight.device, []).append(weight)
    sums: list[float] = []
    for device, group in by_device.items():
        if device.type == "meta":
            continue
        if device.type == "cpu" and native.is_loaded():
            dense = [w for w in group if _is_dense(w)]
            sums += native.checksums(dense)
            group = [w for w in group if not _is_dense(w)]
            if not group:
                continue
        normed = [w for w in group if device.type == "cuda" and w.is_floating_point()]
        summed = [w for w in group if not (device.type == "cuda" and w.is_floating_point())]
        values = [*torch._foreach_norm(normed, 2, dtype=torch.float64)] if normed else []
        values += [_sum_of_bits(w) for w in summed]
        sums += torch.stack([value.double() for value in values]).tolist() if normed else torch.stack(values).tolist()
    return seen, sums


class Follower:
    """A copy of a module, perhaps in another dtype, place or memory format, that takes over changed weights.

    Attributes:
        copy: the copy.
    """

    def __init__(self, original: nn.Module, copy: nn.Module) -> None:
        """`copy` has the parameters and buffers of `original`, in its order, and their present values."""
        self._original, self.copy = original, copy
        self._seen = fingerprint(original)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights of the original, in place, if they have changed."""
        now = fingerprint(self._original)
        if now == self._seen:
            return
        for mine, theirs in zip(_tensors(self.copy), _tensors(self._original), strict=True):
            mine.copy_(theirs)
        self._seen = now


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in itertools.chain(module.parameters(), module.buffers()))


def _is_dense(x: Tensor) -> bool:
    """Whether its elements are next to each other in memory, in whatever order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _sum_of_bits(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x)
    bits = x.view(_BITS[x.itemsize])
    # In 64 bits a sum drops what is carried out of signs: so once more of the upper halves.
    return bits.sum() if x.itemsize < 8 else bits.sum() + (bits >> 32).sum()
