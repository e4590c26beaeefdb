"""One way to call any model: its device, its dtype, its arguments and its result."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from fastddpm_kernels import proving
from torch import Tensor, nn

from fastddpm.common.proofs import PROOFS
from fastddpm.networks.frozen import FrozenUNet, blueprint_of, why_not
from fastddpm.networks.unet.model import UNet

_log = logging.getLogger(__name__)
_EVALUATING_LOCK = threading.Lock()
# By model: how many callers evaluate it, through any `Network`, and which of its modules were in training mode.
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CallingConvention:
    """The way to call a model of any library, found from the names of its parameters.

    Attributes:
        takes_self_condition: whether it has a parameter `x_self_cond`.
        takes_text: whether it has a parameter `encoder_hidden_states`.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        names = _parameters(model)
        self.takes_self_condition = "x_self_cond" in names
        self._labels_name = next((name for name in ("class_labels", "classes", "y") if name in names), None)
        self.takes_text = "encoder_hidden_states" in names

    def arguments(self, labels: Tensor | None, self_condition: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the model's arguments after x and t: by position and by name."""
        named = {} if self_condition is None else {"x_self_cond": self_condition}
        if labels is None:
            return [], named
        if self.takes_text and is_text(labels):
            return [], {"encoder_hidden_states": labels, **named}
        if self._labels_name is None:
            return [labels], named
        return [], {self._labels_name: labels, **named}

    def __call__(
        self, model: Callable[..., Any], x: Tensor, t: Tensor, labels: Tensor | None, self_condition: Tensor | None
    ) -> Tensor:
        """Call `model` with x [N, ...], t int64 [N], labels int64 [N] and x_self_cond, and return its prediction.

        Labels [N, L, D] are the embeddings of texts, for a model with a parameter `encoder_hidden_states`.

        Raises:
            TypeError: it returns no tensor.
        """
        more, named = self.arguments(labels, self_condition)
        return prediction_of(model(x, t, *more, **named))


def is_text(labels: Tensor) -> bool:
    """Return whether labels are the embeddings of texts, floating-point [N, L, D]."""
    return labels.ndim == 3 and labels.is_floating_point()


def prediction_of(out: Any) -> Tensor:
    """Return the tensor in a model's result: the result itself, the first of a tuple, or its `.sample`.

    Raises:
        TypeError: the result is none of these.
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return out[0]
    if isinstance(sample := getattr(out, "sample", None), Tensor):
        return sample
    raise TypeError(f"model returned a {type(out).__name__}, must return a tensor, a tuple or have a .sample")


class UNetWrapper(nn.Module, ABC):
    """A model that computes its prediction from a U-Net's.

    If the U-Net can be frozen, what `bind_frozen` returns runs in place of `forward`.
    """

    @abstractmethod
    def to_freeze(self) -> nn.Module | None:
        """Return the U-Net, or None to call it as it is."""

    def bind_frozen(
        self,
        frozen: FrozenUNet,
        inputs: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> BoundNetwork:
        """Bind the wrapper to buffers as `Network.bind` does, with the U-Net frozen: by default the U-Net alone."""
        return frozen.bind(inputs, timesteps, labels, conditions)


class Network:
    """A model on the device and in the dtype it runs in: the model itself if it is there already, else a copy.

    Attributes:
        model: the model that is called; the one given if it is frozen.
        frozen: the U-Net prepared for sampling, which `bind` runs in its place, or None.
        config: its configuration, or None.
        device, dtype: the device and dtype it runs in.
        takes_self_condition: whether it has a parameter `x_self_cond` that is not among the channels of its input.
        starts_without: whether `x_self_cond` is None at the first step, as in the model's library, instead of zeros.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        *,
        allow_tf32: bool = False,
        weight_dtype: torch.dtype | None = None,
        freeze: bool = False,
        frozen: FrozenUNet | None = None,
        fusion: str = "auto",
    ) -> None:
        """See `Sampler` for the arguments.

        `freeze`: prepare the model for sampling if it is a U-Net that can be frozen, or a `UNetWrapper` of one. It then
        runs through `bind` alone. `frozen`: the model prepared already, whose device and dtype hold.

        Raises:
            TypeError: the model cannot be called.
            ValueError: the dtype is none of `DTYPES`, or the device cannot be used.
        """
        if not callable(model):
            raise TypeError(f"model is a {type(model).__name__}, must be an nn.Module or a callable model(x, t)")
        self.convention = CallingConvention(model)
        self.frozen = frozen
        if frozen is not None:
            self.device, self.dtype = frozen.device, frozen.dtype
        else:
            self.device, self.dtype = _place(model, device, dtype)
        if freeze and frozen is None and backend != "reference":
            self.frozen = _frozen(model, self.dtype, self.device, backend, allow_tf32, weight_dtype, fusion)
        if self.frozen is None and weight_dtype is not None:
            raise ValueError(
                f"weight_dtype is {weight_dtype}, must be None: the model is called as it is, not prepared"
            )
        self.model = model if self.frozen else _prepare(model, self.device, self.dtype, backend)
        self.config = getattr(model, "config", None)
        concatenated = self.frozen is not None and self.frozen.blueprint.optional_channels > 0
        self.takes_self_condition = self.convention.takes_self_condition and not concatenated
        self.starts_without = self.takes_self_condition and bool(getattr(model, "starts_without", False))

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None, self_condition: Tensor | None = None) -> Tensor:
        """Return the prediction for x [N, ...] at t int64 [N], given labels int64 [N] and the x0 predicted before."""
        return self.convention(self.model, x, t, labels, self_condition)

    def new_input(self, shape: Sequence[int]) -> Tensor:
        """Return zeros [N, C, ...] for `bind`, with the dtype, device and memory format that the network reads best."""
        if self.frozen is not None:
            return self.frozen.new_input(shape)
        return torch.zeros(tuple(shape), dtype=self.dtype, device=self.device)

    def bind(
        self,
        inputs: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        self_condition: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> BoundNetwork:
        """Bind the network to buffers that stay where they are while their values change.

        Args:
            inputs: [N, C, ...] from `new_input`, or samples of one.
            timesteps: int64 [S], of every row of the loop's table.
            labels: int64 [N], or None.
            self_condition: like `inputs`, or None.
            conditions: the model's further arguments [N, ...] by name, if it takes any.
        """
        if self.frozen is not None and isinstance(self.model, UNetWrapper):
            return self.model.bind_frozen(self.frozen, inputs, timesteps, labels, conditions)
        if self.frozen is not None:
            return self.frozen.bind(inputs, timesteps, labels, conditions)
        return ModelOnBuffers(self, inputs, timesteps, labels, self_condition, conditions)

    def some_conditions(self, batch: int) -> dict[str, Tensor]:
        """Return further arguments that a prepared U-Net takes, with text of `TOKENS` tokens: to measure it."""
        if self.frozen is None:
            return {}
        return self.frozen.blueprint.some_conditions(batch, self.device, self.dtype)

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of the weights that a captured graph reads."""
        if self.frozen is not None or not isinstance(self.model, nn.Module):
            return ()
        return tuple(tensor.data_ptr() for tensor in itertools.chain(self.model.parameters(), self.model.buffers()))

    def sample_shape(self, learned_variance: bool) -> tuple[int, ...]:
        """Return (C, H, W) of a sample from the model's config, or (C, L) where its `sample_size` is (L,).

        Raises:
            ValueError: there is no config, or it does not state them.
        """
        size, channels = (getattr(self.config, name, None) for name in ("sample_size", "out_channels"))
        if channels is None:
            channels = getattr(self.config, "in_channels", None)
        elif learned_variance:
            channels //= 2
        if size is None or channels is None:
            raise ValueError("shape is None, must be given: the model has no config with sample_size and in_channels")
        return (channels, *((size, size) if isinstance(size, int) else size))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep every module of the model in eval mode inside, until the last thread leaves."""
        if self.frozen is not None or not isinstance(self.model, nn.Module):
            yield
            return
        model = self.model
        with _EVALUATING_LOCK:
            users, training = _EVALUATING.get(model, (0, []))
            if users == 0:
                training = [module for module in model.modules() if module.training]
                model.eval()
            _EVALUATING[model] = users + 1, training
        try:
            yield
        finally:
            with _EVALUATING_LOCK:
                users, training = _EVALUATING.pop(model)
                if users > 1:
                    _EVALUATING[model] = users - 1, training
                else:
                    for module in training:
                        module.training = True


class BoundNetwork(Protocol):
    """A network on its buffers: a function of the step alone."""

    def load(self) -> None:
        """Take over the present `timesteps`, `labels`, conditions and weights of the model."""

    def __call__(self, step: Tensor) -> Tensor:
        """Return the prediction for `inputs` at row `step` (int64 [1]). The next call may overwrite it."""
        ...


class ModelOnBuffers:
    """A model on its buffers, called as it is."""

    def __init__(
        self, network: Network, inputs: Tensor, timesteps: Tensor, labels: Tensor | None, self_condition: Tensor | None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._network, self._inputs, self._timesteps = network, inputs, timesteps
        self._more, named = network.convention.arguments(labels, self_condition)
        self._named = {**named, **(conditions or {})}

    def load(self) -> None:
        """Do nothing: the model reads the buffers themselves."""

    def __call__(self, step: Tensor) -> Tensor:
        t = self._timesteps.index_select(0, step).expand(len(self._inputs))
        return prediction_of(self._network.model(self._inputs, t, *self._more, **self._named))


def _frozen(
    model: Callable[..., Any], dtype: torch.dtype, device: torch.device, backend: str, allow_tf32: bool,
    weight_dtype: torch.dtype | None, fusion: str,
) -> FrozenUNet | None:  # fmt: skip
    """Return the model's U-Net prepared for sampling, or None if it cannot be."""
    unet = model.to_freeze() if isinstance(model, UNetWrapper) else model
    kind = blueprint_of(unet)
    if not isinstance(unet, UNet) and (kind is None or (unet is model and not kind.alone)):
        return None
    reason = why_not(unet, device)
    if reason is None and isinstance(unet, nn.Module):
        frozen = FrozenUNet(
            unet, dtype, device, backend=backend, allow_tf32=allow_tf32, weight_dtype=weight_dtype, fusion=fusion
        )
        reason = frozen.differs() if frozen.blueprint.foreign else None
        if reason is None and frozen.device.type == "cuda" and frozen.backend == "triton" and backend == "auto":
            reason = proving.why_not("network", frozen.device, PROOFS)
        if reason is None:
            return frozen
    _log.info("the network is not prepared for sampling: %s", reason)
    return None


def _place(
    model: Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if dtype is None:
        own = first.dtype if first is not None else torch.float32
        dtype = own if own in DTYPES else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, must be one of {', '.join(map(str, DTYPES))}")
    if device is None:
        return (first.device if first is not None else torch.device("cpu")), dtype
    return usable_device(device), dtype


def usable_device(device: torch.device | str) -> torch.device:
    """Return `device` with its index.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        device = torch.empty(0, device=device).device  # with its index: "cuda" is not equal to "cuda:0"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {str(device)!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("device is 'meta', which cannot be used: it holds no values")
    return device


def _prepare(model: Callable[..., Any], device: torch.device, dtype: torch.dtype, backend: str) -> Callable[..., Any]:
    if not isinstance(model, nn.Module):
        return model
    ours = isinstance(model, UNet) and model.backend != backend
    moved = any(p.device != device or p.dtype != dtype for p in model.parameters())
    if not (ours or moved):
        return model
    model = copy.deepcopy(model).to(device=device, dtype=dtype)
    if isinstance(model, UNet):
        model.backend = backend
    return model


def _parameters(model: Callable[..., Any]) -> set[str]:
    """Return the names of the model's parameters, or an empty set if they are not known."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
