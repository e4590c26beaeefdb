"""A U-Net prepared for sampling: everything that does not depend on the state is computed before the first step.

- The time embedding and the projections of all blocks are one table, a row per step (`time_table`).
- Weights are folded, exactly, and stored once in the compute dtype, channels-last (`folding`).
- The forward is a list of instructions over numbered slots of one block of memory (`lowering`, `instructions`,
  `program`): residual additions and biases are parts of the norms and 1x1 convolutions that read them, skip
  connections are read where they are.

The folds are exact algebra: in float64 the result differs from the U-Net's by rounding alone. Weights that change later
are taken over at the next `load`; a U-Net whose layers change, or get hooks, is refused there.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from fastddpm_kernels._backend import resolve
from torch import Tensor, nn

from fastddpm import layers
from fastddpm.frozen.constants import Constants
from fastddpm.frozen.folding import Embeddings, time_projections
from fastddpm.frozen.instructions import Instruction, Machine
from fastddpm.frozen.lowering import Lowering
from fastddpm.frozen.program import Program
from fastddpm.frozen.time_table import TimeTable
from fastddpm.unet import UNet

_LAYERS = (
    UNet,
    layers.EmbeddingMLP,
    layers.ResnetBlock,
    layers.Attention,
    layers.Downsample,
    layers.Upsample,
    layers.DownBlock,
    layers.MidBlock,
    layers.UpBlock,
    nn.Conv2d,
    nn.Dropout,
    nn.Embedding,
    nn.GroupNorm,
    nn.Linear,
    nn.ModuleList,
)
_METHODS = {kind: {name for name in dir(kind) if callable(getattr(kind, name))} for kind in _LAYERS}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize


def why_not(model: object, device: torch.device | str | None = None) -> str | None:
    """Why a model cannot be frozen, to run on `device` (None: where it is), or None."""
    if type(model) is not UNet:
        return f"it is a {type(model).__name__}, not a fastddpm.UNet"
    for name, module in model.named_modules():
        if type(module) not in _LAYERS:
            return f"its layer {name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its layer {name or 'forward'} has hooks"
        if replaced := vars(module).keys() & _METHODS[type(module)]:
            return f"its {'.'.join(filter(None, (name, min(replaced))))} has been replaced"
    for place in (model.device, torch.device(model.device if device is None else device)):
        if place.type not in ("cpu", "cuda", "meta"):
            return f"weights are folded in float64, which {place.type} may not have"
    return None


def freeze(
    unet: UNet,
    timesteps: Tensor | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    backend: str = "auto",
    allow_tf32: bool = False,
) -> FrozenUNet:
    """The U-Net prepared for sampling at given timesteps. The U-Net itself is not changed.

    Args:
        unet: in eval mode or not: dropout does nothing here.
        timesteps: int64 [S], one for every step of the loop; what `FrozenUNet.bind` takes if it is given no others.
        dtype: of the computation: float16, bfloat16, float32 or float64; None for the U-Net's.
        device: None for the U-Net's.
        backend: of the fused kernels: "auto", "triton", "eager" or "reference".
        allow_tf32: let tensor cores round float32 factors to TF32.

    Raises:
        ValueError: the U-Net has layers or hooks that are not fastddpm's own, or a device has no float64.
        BackendError: the backend that was named cannot run on the device.
    """
    frozen = FrozenUNet(unet, dtype, device, backend=backend, allow_tf32=allow_tf32)
    frozen.timesteps = torch.as_tensor(timesteps, dtype=torch.int64, device=frozen.device)
    return frozen


class FrozenUNet:
    """The weights of a U-Net as sampling reads them; `bind` puts them to work on the buffers of a loop.

    Several threads may bind and load programs of it.

    Attributes:
        unet: the U-Net; if its weights change, `refresh` (or a program's `load`) takes over the new ones.
        dtype, device: of the computation, under autocast too.
        fused: whether the fused kernels run: on CUDA and ROCm, and where `triton` is named. Else plain torch.
        static: whether activations have fixed places (CUDA).
        backend: of the fused kernels.
        timesteps: int64 [S], those of `freeze`, or None.
        constants: the folded weights.
        in_channels: of an input buffer: those of the U-Net, or more, filled up with zeros to a whole vector.
    """

    @torch.inference_mode(False)  # what is filled again later must not be an inference tensor
    @torch.no_grad()
    def __init__(
        self,
        unet: UNet,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        backend: str = "auto",
        allow_tf32: bool = False,
        fused: bool | None = None,
    ) -> None:
        """See `freeze`. `fused` overrides the choice that `backend` implies: a test runs fused plans in float64."""
        if reason := why_not(unet, device):
            raise ValueError(f"unet cannot be frozen: {reason}")
        self.unet = unet
        self.dtype = unet.dtype if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point type")
        self.device = unet.device if device is None else torch.empty(0, device=device).device
        gpu = self.device.type in ("cuda", "meta")  # meta stands for CUDA, to count kernels where there is none
        self.backend = "triton" if self.device.type == "meta" else resolve(
            "group_norm_silu", backend, self.device.type, self.dtype
        )
        self.fused = self.backend == "triton" if fused is None else fused
        self.static = gpu and self.fused and torch.version.hip is None
        self.allow_tf32 = allow_tf32
        self.timesteps: Tensor | None = None
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.row_dtype = wide if self.fused else self.dtype
        # Convolutions read whole vectors of channels; three are slow, or copied to eight by the library.
        channels = unet.config.in_channels
        self.in_channels = -(-channels // 8) * 8 if self.static and self.dtype.itemsize == 2 else channels
        self.constants = Constants(self.dtype, self.device)
        self._lock = threading.RLock()
        self._version = 0
        self._fingerprint = self._weights_now()
        self.embeddings = Embeddings(unet).to(self.device)
        weight, bias, self.columns = time_projections(unet)
        self.time_weight, self.time_bias = weight.detach().to(self.device), bias.detach().to(self.device)

    def new_input(self, shape: Sequence[int]) -> Tensor:
        """Zeros [N, C, H, W] for `bind`: channels-last, a slice of `in_channels` channels where those are more."""
        if len(shape) != 4:
            raise ValueError(f"x has shape {tuple(shape)}, must have shape [N, {self.unet.config.in_channels}, H, W]")
        n, channels, height, width = shape
        more = max(self.in_channels - channels, 0) if channels == self.unet.config.in_channels else 0
        buffer = torch.zeros(n, height, width, channels + more, dtype=self.dtype, device=self.device)
        return buffer.permute(0, 3, 1, 2)[:, :channels]

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(self, inputs: Tensor, timesteps: Tensor | None = None, labels: Tensor | None = None) -> Program:
        """The instructions on buffers that stay where they are while their values change; its `load` takes new ones in.

        Args:
            inputs: [N, C, H, W] from `new_input`, or samples of one.
            timesteps: int64 [S] on the device; None for those of `freeze`.
            labels: int64 [N] (or of the kind that the U-Net's `class_embed_type` names), where it has classes. Their
                range is not checked.

        Raises:
            ValueError: a wrong shape or dtype, or labels missing or not wanted.
        """
        config = self.unet.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if inputs.ndim != 4 or inputs.shape[1] != config.in_channels:
            shape = tuple(inputs.shape)
            raise ValueError(f"inputs have shape {shape}, must have shape [N, {config.in_channels}, H, W]")
        if any(size % factor or not size for size in inputs.shape[2:]):
            raise ValueError(
                f"inputs are {inputs.shape[2]}x{inputs.shape[3]} pixels, both must be positive multiples of {factor}"
            )
        timesteps = self.timesteps if timesteps is None else timesteps
        if timesteps is None:
            raise ValueError("timesteps is None, must be given: the U-Net was frozen without")
        if config.has_classes != (labels is not None):
            raise ValueError(
                "class_labels are missing, but this U-Net is class-conditional"
                if labels is None
                else "class_labels are given, but this U-Net has no classes"
            )
        if labels is not None:
            self._check_labels(labels, len(inputs))
        with self._lock:
            return Program(self, inputs, timesteps, labels)

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        config = self.unet.config
        shape = (batch, config.embedding_channels) if config.class_embed_type == "identity" else (batch,)
        if tuple(labels.shape) != shape:
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {shape}")
        if config.class_embed_type is None and labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")

    def whole_input(self, inputs: Tensor) -> Tensor:
        """`inputs` from `new_input` with the channels that fill it up."""
        n, channels, height, width = inputs.shape
        if inputs.stride(3) == channels or inputs.stride(3) < channels:
            return inputs
        return inputs.as_strided((n, inputs.stride(3), height, width), inputs.stride())

    def time_table(self, machine: Machine, timesteps: Tensor, labels: Tensor | None, batch: int) -> TimeTable:
        """The time table of a program."""
        return TimeTable(
            machine, self.embeddings, self.time_weight, self.time_bias, timesteps, labels, batch, self.row_dtype
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> int:
        """Takes over the U-Net's weights if they have changed, into the same places. Returns how often it did.

        Raises:
            ValueError: the U-Net itself has changed, so that it could no longer be frozen.
        """
        with self._lock:
            if reason := why_not(self.unet):
                raise ValueError(f"unet has changed since it was frozen (make a new Sampler): {reason}")
            now = self._weights_now()
            if now != self._fingerprint:
                self._refill()
                self._fingerprint = now  # not before: what has failed is tried again
                self._version += 1
            return self._version

    def _refill(self) -> None:
        self.embeddings.load_state_dict(Embeddings(self.unet).state_dict())
        weight, bias, _ = time_projections(self.unet)
        self.time_weight.copy_(weight)
        self.time_bias.copy_(bias)
        machine = Machine(self.fused, self.static, self.backend)
        row = torch.zeros(1, len(self.time_bias), dtype=self.row_dtype, device=self.device)
        factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.constants.refilling = True
        try:
            Lowering(self, machine, row, 1, (factor, factor), self.in_channels)
        finally:
            self.constants.refilling = False

    def _weights_now(self) -> object:
        """What differs when the weights do: their places, how often autograd saw them change, and a sum over each.

        Autograd sees neither what is written through `.data` nor inference tensors; the sums do not see permutations
        (nor, on CUDA, signs). On CUDA they are norms in float64, of all weights by a few kernels.
        """
        weights = [parameter.detach() for parameter in self.unet.parameters()]
        seen = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        if self.unet.device.type == "meta":
            return seen
        cuda = self.unet.device.type == "cuda"
        sums = torch._foreach_norm(weights, 2, dtype=torch.float64) if cuda else [_sum_of_bits(w) for w in weights]
        return seen, torch.stack(list(sums)).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())


def _sum_of_bits(x: Tensor) -> Tensor:
    bits = x.view(_BITS[x.itemsize])
    # In 64 bits a sum drops what is carried out of signs: so once more of the upper halves.
    return bits.sum() if x.itemsize < 8 else bits.sum() + (bits >> 32).sum()


def cuda_instructions(
    unet: UNet, batch: int = 1, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.float16
) -> list[Instruction]:
    """What one step of the frozen U-Net runs on a CUDA GPU, counted without one.

    Args:
        batch: N. More samples fill the chip with fewer splits of the norms.
        size: (height, width) of the images; None for the config's.
        dtype: of the computation.

    Returns:
        The instructions, in order; the sum of their `kernels` is the number of kernels launched. Libraries may launch
        further ones inside a convolution, which only a run shows.
    """
    config = unet.config
    if size is None:
        own = config.sample_size or 32
        size = (own, own) if isinstance(own, int) else (own[0], own[1])
    frozen = FrozenUNet(copy.deepcopy(unet).to("meta"), dtype, "meta")
    inputs = frozen.new_input((batch, config.in_channels, *size))
    timesteps = torch.empty(1000, dtype=torch.int64, device="meta")
    labels = None
    if config.has_classes:
        identity = config.class_embed_type == "identity"
        shape = (batch, config.embedding_channels) if identity else (batch,)
        labels = torch.empty(shape, dtype=torch.float32 if identity else torch.int64, device="meta")
    return frozen.bind(inputs, timesteps, labels).instructions
