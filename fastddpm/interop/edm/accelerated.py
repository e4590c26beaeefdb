"""What accelerated networks of EDM and PhysicsNeMo share: options, generators per seed, the network's attributes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastddpm.networks.network import Network

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How a network is run; see `accelerate`."""

    allow_general: bool = True
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    batch_size: int | str | None = None


class Seeds:
    """One generator per sample, seeded as EDM's `StackedRandomGenerator`.

    A sample draws the same numbers whatever others are drawn with it.
    """

    def __init__(self, device: torch.device, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def randn_like(self, like: Tensor) -> Tensor:
        """Return noise of the shape and dtype of `like` [N, ...]."""
        shape, dtype, device = like.shape[1:], like.dtype, like.device
        return torch.stack([torch.randn(shape, generator=g, dtype=dtype, device=device) for g in self._generators])

    def randint(self, high: int) -> Tensor:
        """Return integers below `high`, int64 [N]."""
        device = self._generators[0].device
        return torch.stack([torch.randint(high, (), generator=each, device=device) for each in self._generators])


class Accelerated:
    """A network with fastddpm's in place of its U-Net; all other attributes are the network's.

    Attributes:
        net: the network itself.
        methods: those that it gets when it is accelerated in place.
    """

    methods: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: Any, options: Options) -> None:
        self.net, self.options = net, options
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not there yet, while being copied
            raise AttributeError(name)
        return getattr(self.net, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.net!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"net": self.net, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def _device(self) -> torch.device:
        return next(self.net.parameters()).device

    def _dtype(self) -> torch.dtype | str:
        if self.options.dtype is not None:
            return self.options.dtype
        half = bool(getattr(self.net, "use_fp16", False)) and self._device.type == "cuda"
        return torch.float16 if half else torch.float32

    def _identity(self) -> tuple[object, ...]:
        """Return what must not change while a network that was prepared is in use."""
        own = tuple((id(p), p.dtype, p.device) for p in self.net.parameters())
        return (id(self.net.model), self._dtype(), *own)

    def _tell(self, network: Network) -> None:
        """Say in the log that the U-Net runs as it is.

        Raises:
            ValueError: `allow_general` is False.
        """
        if network.frozen is not None or self.options.backend == "reference":
            return
        what = f"the U-Net, a {type(self.net.model).__name__}, is not prepared for sampling"
        if not self.options.allow_general:
            raise ValueError(f"{what}, must be one of EDM's or PhysicsNeMo's own or allow_general be True")
        _log.warning("%s: it runs as it is in fastddpm's loop", what)

    def check(self) -> None:
        """Prepare the network, and compare it once with the original."""
        raise NotImplementedError
