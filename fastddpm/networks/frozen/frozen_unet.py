"""The weights of a U-Net as sampling reads them, and the programs that run on them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastddpm_kernels import proving
from fastddpm_kernels.backend import resolve, unproved
from fastddpm_kernels.conv.packing import why_not_stored
from fastddpm_kernels.native.machine import last_cache
from torch import Tensor, nn

from fastddpm.common.proofs import PROOFS
from fastddpm.networks import weights
from fastddpm.networks.comparing import changed, difference, evaluating, settings_of, some_noise
from fastddpm.networks.frozen.constants import Constants
from fastddpm.networks.frozen.instructions import Machine
from fastddpm.networks.frozen.kinds import KINDS, blueprint_of
from fastddpm.networks.frozen.program import Program
from fastddpm.networks.frozen.time_table import TimeTable

FUSION = ("auto", "full", "parts")
_WHOLE = ("conv", "attention_block", "layer_norm_linear")  # the ops of whole layers
# What a frozen U-Net runs on one backend besides norms.
_OPS = (
    "conv", "attention", "pointwise_conv", "residual_add", "layer_norm", "geglu", "cross_attention", "conv1d",
    "group_norm_mish",
)  # fmt: skip


def why_not(model: object, device: torch.device | str | None = None) -> str | None:
    """Return why a model cannot be frozen to run on `device` (None for its own), or None if it can."""
    kind = blueprint_of(model)
    if kind is None:
        names = dict.fromkeys(known.name for known in KINDS)
        return f"it is a {type(model).__name__}, must be {' or '.join(names)}"
    assert isinstance(model, nn.Module)
    if reason := kind.why_not(model) or kind.edited(model):
        return reason
    own = next(model.parameters()).device
    for place in (own, torch.device(own if device is None else device)):
        if place.type not in ("cpu", "cuda", "meta"):
            return f"weights are folded in float64, which {place.type} may not have"
    return None


class FrozenUNet:
    """The weights of a U-Net as sampling reads them; `bind` makes a program that runs on the buffers of a loop.

    Several threads may bind and load its programs.

    Attributes:
        unet: the U-Net; if its weights change, `refresh` (or a program's `load`) takes over the new ones.
        blueprint: the description of its kind of U-Net.
        dtype, device: of the computation, under autocast too.
        fused: whether the fused kernels run, else plain torch. They run on CUDA and ROCm, on a CPU with a C++ compiler
            in float32 (and in bfloat16 if the CPU multiplies it), and if `backend` names them.
        static: whether activations have fixed addresses (CUDA, and native kernels).
        backend: of the fused kernels.
        fusion: of the layers' parts, see `freeze`; "parts" where whole layers cannot run.
        mixed: (batch, size) of programs in which some layers are whole and others are not: refilled as they are.
        weight_dtype: that native convolutions' weights are stored in, or None for `dtype`.
        cached: whether a CPU's last cache keeps all weights from step to step.
        timesteps: int64 [S], those of `freeze`, or None.
        constants: the folded weights.
        releasing: whether the U-Net's own weights go as `bind` takes them over, see `release`.
        watch: of the U-Net, if `refresh` is to look only for the changes that a `Watch` notices; else None.
        in_channels: of an input buffer: the U-Net's, or more, padded with zeros to a whole vector.
    """

    @torch.inference_mode(False)  # weights are refilled later, so they must not be inference tensors
    @torch.no_grad()
    def __init__(
        self,
        unet: nn.Module,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        backend: str = "auto",
        allow_tf32: bool = False,
        weight_dtype: torch.dtype | None = None,
        fusion: str = "auto",
        fused: bool | None = None,
    ) -> None:
        """See `freeze`. `fused` overrides the choice that `backend` implies: a test runs fused plans in float64."""
        if reason := why_not(unet, device):
            raise ValueError(f"unet cannot be frozen: {reason}")
        kind = blueprint_of(unet)
        assert kind is not None
        self.unet, self.blueprint = unet, kind(unet)
        self._settings = settings_of(unet)
        first = next(unet.parameters())
        self.dtype = first.dtype if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point type")
        self.device = first.device if device is None else torch.empty(0, device=device).device
        gpu = self.device.type in ("cuda", "meta")  # meta stands for CUDA, to count kernels without a GPU
        self.backend = (
            "triton"
            if self.device.type == "meta"
            else resolve("group_norm_silu_", backend, self.device.type, self.dtype, others=_OPS)
        )
        odd = self.blueprint.pairs and self.dtype == torch.bfloat16 and backend == "auto" and self._has_odd_widths()
        if self.backend == "native" and odd:
            self.backend = "eager"  # native products take channels in pairs
        self.fused = self.backend in ("triton", "native") if fused is None else fused
        if self.backend == "native" and not self.fused:
            self.backend = "eager"
        native = self.dtype if self.backend == "native" else None
        if weight_dtype is not None and (native is None or (reason := why_not_stored(weight_dtype, native))):
            reason = reason if native else f"the backend is {self.backend}, which reads weights in {self.dtype}"
            raise ValueError(f"weight_dtype is {weight_dtype}, must be None here: {reason}")
        self.weight_dtype = weight_dtype
        size = sum(p.numel() for p in unet.parameters()) * (weight_dtype or self.dtype).itemsize
        self.cached = 4 * size <= last_cache()  # packed weights may be larger, and others use the cache too
        self.static = self.fused and (self.backend == "native" or (gpu and torch.version.hip is None))
        if fusion not in FUSION:
            raise ValueError(f"fusion is {fusion!r}, must be one of {', '.join(map(repr, FUSION))}")
        whole = self.fused and self.backend != "native" and torch.version.hip is None
        if fusion == "full" and not whole:
            raise ValueError(f"fusion is 'full', must be 'auto' or 'parts' on {self.device.type} with {self.backend}")
        if fusion == "auto" and whole and self.device.type == "cuda":  # trusted where proven
            reason = unproved(_WHOLE, "cuda") or proving.why_not("whole network", self.device, PROOFS)
            whole = reason is None
        self.fusion = fusion if whole else "parts"
        self.mixed: set[tuple[int, tuple[int, int]]] = set()
        self.allow_tf32 = allow_tf32
        self.timesteps: Tensor | None = None
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.row_dtype = wide if self.fused else self.dtype
        # Convolutions read whole vectors of channels; three channels are slow, or the library copies them to eight.
        channels = self.blueprint.in_channels
        self.in_channels = -(-channels // 8) * 8 if self.static and self.dtype.itemsize == 2 else channels
        self.constants = Constants(self.dtype, self.device)
        self._lock = threading.RLock()
        self._version = 0
        self.releasing = False
        self.watch: weights.Watch | None = None
        self._fingerprint = weights.fingerprint(unet)
        self.embeddings = self.blueprint.embeddings().to(self.device)
        weight, bias, self.columns = self.blueprint.time_projections()
        self.time_weight, self.time_bias = weight.detach().to(self.device), bias.detach().to(self.device)

    def _has_odd_widths(self) -> bool:
        widths = {m.in_features for m in self.unet.modules() if isinstance(m, nn.Linear)}
        widths |= {m.in_channels for m in self.unet.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}
        return any(width % 2 for width in widths - {self.blueprint.in_channels})  # the input is padded

    def new_input(self, shape: Sequence[int]) -> Tensor:
        """Return zeros [N, C, H, W] for `bind`: channels-last, a slice of `in_channels` channels if those are more.

        C is the U-Net's number of input channels, with or without the optional ones.
        """
        blueprint = self.blueprint
        if len(shape) != 2 + blueprint.dims:
            raise ValueError(f"x has shape {tuple(shape)}, must have shape {self._shape}")
        if blueprint.dims == 1:  # the program copies the input
            return torch.zeros(tuple(shape), dtype=self.dtype, device=self.device)
        n, channels, height, width = shape
        first = blueprint.in_channels - channels
        if first not in (0, blueprint.optional_channels):  # `bind` refuses it
            return torch.zeros(n, channels, height, width, dtype=self.dtype, device=self.device)
        buffer = torch.zeros(n, height, width, self.in_channels, dtype=self.dtype, device=self.device)
        return buffer.permute(0, 3, 1, 2)[:, first : first + channels]

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(
        self,
        inputs: Tensor,
        timesteps: Tensor | None = None,
        labels: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Program:
        """Return a program on buffers that keep their memory while their values change; its `load` reads new values.

        Args:
            inputs: [N, C, H, W] from `new_input`, or samples of one.
            timesteps: int64 [S] on the device; None for those of `freeze`.
            labels: int64 [N] (or as the U-Net's `class_embed_type` needs), if the U-Net has classes. Their range is
                not checked.
            conditions: what else the U-Net takes, [N, ...] by the names of `Blueprint.conditions`, on the device. All
                that depends on them alone is computed once per `load`.

        Raises:
            ValueError: a shape or dtype is wrong, labels or conditions are missing, or are given but not taken.
        """
        blueprint, factor = self.blueprint, self.blueprint.factor
        left_out = blueprint.in_channels - inputs.shape[1] if inputs.ndim == 2 + blueprint.dims else None
        if left_out not in (0, blueprint.optional_channels):
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}, must have shape {self._shape}")
        factor = 1 if blueprint.any_size else factor
        least = blueprint.smallest_size or factor
        if any(size % factor or size < least for size in inputs.shape[2:]):
            sizes = "x".join(map(str, inputs.shape[2:]))
            more = "" if least == factor else f", at least {least}"
            both = "pixels, both must be positive multiples"
            if blueprint.dims == 1:
                both = "long, which must be a positive multiple"
            raise ValueError(f"inputs are {sizes} {both} of {factor}{more}")
        timesteps = self.timesteps if timesteps is None else timesteps
        if timesteps is None:
            raise ValueError("timesteps is None, must be given: the U-Net was frozen without")
        if blueprint.has_labels != (labels is not None):
            raise ValueError(
                "class_labels are missing, but this U-Net is class-conditional"
                if labels is None
                else "class_labels are given, but this U-Net has no classes"
            )
        if labels is not None:
            blueprint.check_labels(labels, len(inputs))
        conditions = conditions or {}
        blueprint.check_conditions(conditions, len(inputs))
        for name, given in conditions.items():
            if given.device != self.device:
                raise ValueError(f"{name} is on {given.device}, must be on {self.device}")
        with self._lock:
            program = Program(self, inputs, timesteps, labels, conditions)
            self.constants.complete = self.releasing
            return program

    def release(self) -> None:
        """Free the U-Net's own weights, layer by layer, as the first `bind` takes them over: memory holds them once.

        Afterwards the U-Net itself computes NaN, its weights are no longer followed, and later calls of `bind` use the
        forms of the weights that the first one made. What is computed once per call stays.

        Raises:
            ValueError: a program is bound already, or this kind of U-Net does not support it.
        """
        if self.constants.tensors:
            raise ValueError("release must be called before the first bind: its weights are in memory twice already")
        if not self.blueprint.releases:
            raise ValueError(f"unet is {self.blueprint.name}, whose weights cannot be released")
        self.releasing = True

    @property
    def _shape(self) -> str:
        return f"[N, {self.blueprint.in_channels}, {'L' if self.blueprint.dims == 1 else 'H, W'}]"

    def whole_input(self, inputs: Tensor) -> Tensor:
        """Return `inputs` from `new_input` with the channels that were left out and those of the padding."""
        n, channels, height, width = inputs.shape
        first, whole = self.blueprint.in_channels - channels, inputs.stride(3)
        if whole <= channels or whole != self.in_channels:
            return inputs
        return inputs.as_strided((n, whole, height, width), inputs.stride(), inputs.storage_offset() - first)

    def time_table(
        self, machine: Machine, timesteps: Tensor, labels: Tensor | None, conditions: Mapping[str, Tensor], batch: int
    ) -> TimeTable:
        """Return the time table of a program."""
        return TimeTable(
            machine, self.embeddings, self.time_weight, self.time_bias, timesteps, labels, batch, self.row_dtype,
            conditions=conditions,
        )  # fmt: skip

    @torch.inference_mode(False)
    def differs(self) -> str | None:
        """Describe how this differs from the U-Net's own forward on one small sample; None if rounding explains it."""
        blueprint, first = self.blueprint, next(self.unet.parameters())
        size, optional = 2 * blueprint.factor, blueprint.optional_channels
        x = some_noise((blueprint.in_channels, *[size] * blueprint.dims), first)
        with evaluating(self.unet):
            inputs, t = self.new_input(x.shape), torch.tensor([500], device=self.device)
            inputs.copy_(x)
            labels, conditions = blueprint.some_labels(1, first.device), blueprint.some_conditions(1, self.device)
            program = self.bind(inputs, t, blueprint.some_labels(1, self.device), conditions)
            own = {"x_self_cond": x[:, :optional]} if optional else {}
            own |= {k: v.to(first if v.is_floating_point() else first.device) for k, v in conditions.items()}
            theirs = blueprint.call(x[:, optional:], t.to(first.device), labels, **own)
            found = difference(theirs, program(torch.zeros_like(t)), self.weight_dtype or self.dtype)
        return None if found is None else f"frozen it {found} of what it computes itself"

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> int:
        """Take over the U-Net's weights if they have changed, into the same memory. Return how often that happened.

        Raises:
            ValueError: the U-Net's layers have changed.
        """
        if self.releasing:
            return self._version
        with self._lock:
            if self.watch is not None and not self.watch.changed():
                return self._version
            now = settings_of(self.unet)
            if reason := self.blueprint.why_not(self.unet) or changed(self._settings or now, now):
                raise ValueError(f"unet has changed since it was frozen (make a new Sampler): {reason}")
            self._settings = now
            seen = weights.fingerprint(self.unet)
            if seen != self._fingerprint:
                self._refill()
                self._fingerprint = seen  # only now, so that a failed refresh is tried again
                self._version += 1
            if self.watch is not None:
                self.watch.accept()
            return self._version

    def _refill(self) -> None:
        self.embeddings.load_state_dict(self.blueprint.embeddings().state_dict())
        weight, bias, _ = self.blueprint.time_projections()
        self.time_weight.copy_(weight)
        self.time_bias.copy_(bias)
        machine = Machine(self.fused, self.static, self.backend)
        row = torch.zeros(1, len(self.time_bias), dtype=self.row_dtype, device=self.device)
        size = self.blueprint.smallest_size or self.blueprint.factor
        conditions = self.blueprint.some_conditions(1, self.device, optional=True)
        before, self.constants.refilling = self.fusion, True
        try:
            plans = [("parts", 1, (size, size)), ("full", 1, (size, size))]  # whichever a program has read
            plans += [("auto", *at) for at in sorted(self.mixed)]
            for self.fusion, batch, at in plans[:1] if before == "parts" else plans:
                self.blueprint.builder(self, machine, row, batch, at, self.in_channels, conditions).lower()
        finally:
            self.fusion, self.constants.refilling = before, False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_settings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Settings compare objects by identity, and the objects are copies now.
        vars(self).update(state, _lock=threading.RLock(), _settings=None)
