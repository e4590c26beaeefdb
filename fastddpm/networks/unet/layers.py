"""The layers of the compact U-Net (`model.py`), with the parameter names of diffusers' UNet2DModel.

An `nn.GroupNorm` here only holds parameters. Each normalisation runs as one `group_norm_silu`, fused with
its surroundings (the skip concatenation, the time embedding, SiLU). A layer's `backend` says which backend
that op, the 3x3 convolutions and attention use; `UNet.backend` sets it everywhere.

In training mode, on a CPU machine with a compiler, "auto" is "native" for layers that are large enough: in float32,
and under autocast to bfloat16 where the CPU multiplies it. In evaluation mode "auto" is torch's own, which has the
least error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fastddpm_kernels.attention import training as attention_training
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv.training import conv3x3, resolve_conv3x3
from fastddpm_kernels.group_norm_silu import group_norm_silu
from torch import Tensor, nn

from fastddpm.networks.unet.plan import SKIP_IMAGE_CHANNELS

# The least number of input and of output channels for which a native 3x3 convolution trains faster than torch's, and
# the least number of values for which a native norm does (benchmarks/NOTES.md).
NATIVE_CHANNELS = {torch.float32: 16, torch.bfloat16: 64}
NATIVE_VALUES = 2**17

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}


def timestep_embedding(
    t: Tensor, channels: int, *, flip_sin_to_cos: bool, freq_shift: float, scale: float = 1.0
) -> Tensor:
    """Return sinusoids of the timestep (Ho et al. 2020, after Vaswani et al. 2017): float32 [N, channels].

    With half = channels // 2 frequencies, number i is 10000 ** (-i / (half - freq_shift)). If `channels` is odd, the
    last channel is 0.

    Args:
        t: timesteps [N], integer or (for models trained so) real. The sinusoids are computed in float32, the
            precision that the published models were trained with.
        channels: the number of values per timestep.
        flip_sin_to_cos: [cos, sin] instead of [sin, cos].
        freq_shift: 1 makes the last frequency exactly 1 / 10000 (the original DDPM); 0 stops one short of it.
        scale: a factor of the timesteps, multiplied in float32.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = (t.float() * scale)[:, None] * torch.exp(exponent / (half - freq_shift))[None, :]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class Sinusoids(nn.Module):
    """`timestep_embedding` as a module that holds the settings."""

    def __init__(self, channels: int, *, flip_sin_to_cos: bool, freq_shift: float, scale: float = 1.0) -> None:
        super().__init__()
        self.channels, self.flip_sin_to_cos = channels, flip_sin_to_cos
        self.freq_shift, self.scale = freq_shift, scale

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(
            t, self.channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift, scale=self.scale
        )


class FourierProjection(nn.Module):
    """Sines and cosines of random frequencies of log t (Tancik et al. 2020; Song et al. 2021): [N] -> [N, 2 channels].

    The frequencies are drawn once and not trained.
    """

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = torch.log(t)[:, None] * self.weight[None, :] * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear: from sinusoids [N, in_channels] to an embedding [N, channels]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1, with the algorithm of the backend that multiplies least."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "native" or (self.backend == "auto" and self.training):
            h = _as_autocast(x)
            if self.backend == "native" or self._trains_natively(h):
                return conv3x3(h, self.weight, self.bias, backend="native")
        return conv3x3(x, self.weight, self.bias, backend="eager")

    def _trains_natively(self, x: Tensor) -> bool:
        wide = min(self.weight.shape[:2]) >= NATIVE_CHANNELS.get(x.dtype, 0)
        return wide and resolve_conv3x3(x, self.weight, self.bias) == "native"


class ResnetBlock(nn.Module):
    """(shortcut(x) + conv2(dropout(SiLU(norm2(conv1(SiLU(norm1(x))), embedding))))) / output_scale.

    The projected embedding is added before the second norm, or (`scale_shift`) applied after it as
    norm2 * (1 + scale) + shift. `resample`, one of `RESAMPLE`, halves or doubles the input of conv1 and of the
    shortcut. `activation`, one of `ACTIVATIONS`, is used for the norms and the embedding. The second norm has
    `groups_out` groups, if given. `shortcut` asks for the convolution on the residual path even where the widths are
    the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale: float = 1.0,
        resample: str | None = None,
        groups_out: int | None = None,
        activation: str = "silu",
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.activation = activation
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups_out or groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        shortcut = shortcut or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if shortcut else None

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return the block's output [N, out_channels, H, W], of half or twice the size where it resamples.

        Args:
            x: [N, C, H, W].
            emb: the activation of the time (and class) embedding, [N, emb_channels]; further channels, which other
                blocks read, may follow.
            skip: [N, in_channels - C, H, W]; the block computes as if it were concatenated to `x`.
        """
        act = self.activation
        h = norm_silu(self.norm1, x, self.backend, x2=skip, activation=act)
        if self.resample is not None:
            assert skip is None  # no U-Net has such a block
            resample = RESAMPLE[self.resample]
            h, x = resample(h), resample(x)
        h = self.conv1(h)
        own = self.time_emb_proj.in_features
        time = self.time_emb_proj(emb if emb.shape[1] == own else emb[:, :own])
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm_silu(self.norm2, h, self.backend, scale=scale, shift=shift, activation=act)
        else:
            h = norm_silu(self.norm2, h, self.backend, time_bias=time, activation=act)
        h = self.conv2(self.dropout(h))
        y = shortcut(self.conv_shortcut, x, skip) + h
        return y if self.output_scale == 1 else y / self.output_scale


def shortcut(conv: nn.Conv2d | None, x: Tensor, skip: Tensor | None) -> Tensor:
    """Return the residual path of a block: concat(x, skip), through the 1x1 convolution `conv` if there is one."""
    if conv is None:
        return x if skip is None else torch.cat([x, skip], dim=1)
    if skip is None:
        return conv(x)
    # A 1x1 convolution of a concatenation is the sum over its parts, so the concatenation is never built.
    first, second = conv.weight.split([x.shape[1], skip.shape[1]], dim=1)
    return F.conv2d(x, first, conv.bias) + F.conv2d(skip, second)


class AdaGroupNorm(nn.GroupNorm):
    """Group norm without parameters, times 1 + scale and plus shift; both are linear in the raw embedding."""

    def __init__(self, emb_channels: int, channels: int, groups: int, eps: float) -> None:
        super().__init__(groups, channels, eps, affine=False)
        self.linear = nn.Linear(emb_channels, 2 * channels)

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, skip: Tensor | None = None, activation: str | None = None, backend: str = "auto"
    ) -> Tensor:
        """Normalise concat(x, skip).

        `emb` is the embedding [N, emb_channels]; its activation may stand before it.
        """
        scale, shift = self.linear(emb[:, emb.shape[1] - self.linear.in_features :]).chunk(2, dim=1)
        return norm_silu(self, x, backend, x2=skip, scale=scale, shift=shift, activation=activation)


class AdaResnetBlock(nn.Module):
    """x + conv2(dropout(act(norm2(conv1(act(norm1(x)))))), with norms that the embedding scales and shifts.

    A block that changes the width has a convolution without bias on the residual path.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        groups: int,
        groups_out: int,
        eps: float,
        dropout: float = 0.0,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.activation = activation
        self.norm1 = AdaGroupNorm(emb_channels, in_channels, groups, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = AdaGroupNorm(emb_channels, out_channels, groups_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return the block's output from the arguments of `ResnetBlock.forward`; read the last channels of `emb`."""
        h = self.conv1(self.norm1(x, emb, skip, self.activation, self.backend))
        h = self.norm2(h, emb, None, self.activation, self.backend)
        return shortcut(self.conv_shortcut, x, skip) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the pixels, with residual: (x + to_out(attend(norm(x)))) / output_scale.

    There are `channels // head_dim` heads of `head_dim` channels, or one head of all channels where `head_dim` is
    None. `groups` None leaves out the norm. Three linear layers give queries, keys and values; after `fuse`, one does.
    """

    to_q: nn.Linear | None
    to_k: nn.Linear | None
    to_v: nn.Linear | None
    to_qkv: nn.Linear | None

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None,
        groups: int | None,
        eps: float,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.head_dim = channels if head_dim is None else head_dim
        self.heads = channels // self.head_dim
        self.output_scale = output_scale
        inner = self.heads * self.head_dim  # fewer than `channels` where head_dim does not divide them
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_qkv = None
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    @torch.no_grad()
    def fuse(self, fused: bool = True) -> None:
        """Join the layers of queries, keys and values into one, `to_qkv`, or take them apart again."""
        if fused == (self.to_qkv is not None):
            return
        weight, bias = self.qkv()
        made = []
        for w, b in zip(*(([x] if fused else x.chunk(3)) for x in (weight, bias)), strict=True):
            layer = nn.Linear(w.shape[1], w.shape[0], device="meta")
            layer.weight, layer.bias = nn.Parameter(w.clone()), nn.Parameter(b.clone())
            made.append(layer)
        self.to_q = self.to_k = self.to_v = self.to_qkv = None
        if fused:
            (self.to_qkv,) = made
        else:
            self.to_q, self.to_k, self.to_v = made

    def qkv(self) -> tuple[Tensor, Tensor]:
        """Return the weight [3 inner, C] and the bias [3 inner] of queries, keys and values."""
        if self.to_qkv is not None:
            return self.to_qkv.weight, self.to_qkv.bias
        layers = [layer for layer in (self.to_q, self.to_k, self.to_v) if layer is not None]
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of x: [N, C, H, W] -> [N, C, H, W]."""
        h = x if self.group_norm is None else norm_silu(self.group_norm, x, self.backend, activation=None)
        h = h.flatten(2).transpose(1, 2)  # [N, pixels, C], a view where x is channels-last
        if self.to_qkv is not None:
            q, k, v = self.to_qkv(h).chunk(3, dim=-1)
        else:
            assert self.to_q is not None
            assert self.to_k is not None
            assert self.to_v is not None
            q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        backend = "native" if self.backend == "native" else "eager"
        if self.backend == "auto" and self.training:
            backend = attention_training.resolve_attention(q, k, v, self.heads)
        h = attention_training.attention(q, k, v, self.heads, backend=backend)
        h = self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])
        y = x + h
        return y if self.output_scale == 1 else y / self.output_scale


def halve(x: Tensor) -> Tensor:
    """Average 2x2 pixels: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Repeat every pixel in both directions: [N, C, H, W] -> [N, C, 2H, 2W]."""
    if 4 * x.numel() >= 2**31:  # beyond this, channels-last, CUDA returns zeros (pytorch issue 141831)
        x = x.contiguous()
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def fir_halve(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Halve x by the filter (1, 3, 3, 1) with zeros around the image: [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    return F.conv2d(x, fir_kernel(x) / 64 if kernel is None else kernel, stride=2, padding=1, groups=x.shape[1])


def fir_double(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Double x by the filter (1, 3, 3, 1) with zeros around the image: [N, C, H, W] -> [N, C, 2H, 2W]."""
    kernel = fir_kernel(x) / 16 if kernel is None else kernel
    return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def mirrored_halve(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Halve x as `fir_halve` does, but mirror the image at its borders."""
    kernel = fir_kernel(x) / 64 if kernel is None else kernel
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, stride=2, groups=x.shape[1])


def mirrored_double(x: Tensor, kernel: Tensor | None = None) -> Tensor:
    """Double x as `fir_double` does, but mirror the image at its borders."""
    kernel = fir_kernel(x) / 16 if kernel is None else kernel
    return F.conv_transpose2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, stride=2, padding=3, groups=x.shape[1])


def fir_kernel(x: Tensor) -> Tensor:
    """Return the filter (1, 3, 3, 1) in both directions for every channel of `x`: [C, 1, 4, 4].

    It is computed on the device of `x`, because a CUDA graph forbids a copy from the CPU.
    """
    taps = 4 - (2 * torch.arange(4, dtype=x.dtype, device=x.device) - 3).abs()
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


RESAMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "down": halve,
    "up": double,
    "fir_down": fir_halve,
    "fir_up": fir_double,
    # Along the width alone, of sequences as images of height 1.
    "down_along": lambda x: F.avg_pool2d(x, (1, 2)),
    "up_along": lambda x: x.repeat_interleave(2, dim=3),
}


class Downsample(nn.Module):
    """3x3 convolution of stride 2, or means of 2x2 pixels where `padding` is None.

    `padding` 0 pads by one at the right and bottom only, as the original DDPM does.
    """

    def __init__(self, channels: int, padding: int | None) -> None:
        super().__init__()
        self.padding = padding
        self.conv = None if padding is None else nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return halve(x)
        # Under autocast x has the dtype of the 3x3 convolutions before it, and all skips must have the same.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x).to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution unless `convolve` is False."""

    def __init__(self, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        x = double(x)
        return x if self.conv is None else self.conv(x)


class Block(nn.Module):
    """The base class of the blocks of a U-Net.

    Attributes:
        gradient_checkpointing: whether the backward pass recomputes residual blocks, which saves memory.
    """

    gradient_checkpointing: bool

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[Attention] = ()) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def _run(self, resnet: nn.Module, *args: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(resnet, *args, use_reentrant=False)
        return resnet(*args)


class DownBlock(Block):
    """Residual blocks, each followed by attention if there are `attentions`, then the downsampler, if any."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Attention],
        downsampler: Downsample | ResnetBlock | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output and, in order, every intermediate result that the up blocks read as a skip."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self._run(resnet, x, emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, emb) if isinstance(downsampler, ResnetBlock) else downsampler(x)
            skips.append(x)
        return x, skips


class SkipDownBlock(Block):
    """A `DownBlock` of NCSN++, which also halves the image and adds a 1x1 convolution of it."""

    def __init__(
        self, resnets: Sequence[ResnetBlock], attentions: Sequence[Attention], resnet_down: ResnetBlock | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.resnet_down = resnet_down
        self.skip_conv: nn.Conv2d | None = None
        if resnet_down is not None:
            self.skip_conv = nn.Conv2d(SKIP_IMAGE_CHANNELS, resnet_down.conv2.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return what `DownBlock.forward` does, and the image [N, 3, H, W] for the next block."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self._run(resnet, x, emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
            skips.append(x)
        if self.resnet_down is not None and self.skip_conv is not None:
            image = fir_halve(image)
            x = self.skip_conv(image) + self.resnet_down(x, emb)
            skips.append(x)
        return x, skips, image


class KDownBlock(Block):
    """Residual blocks with a skip each, then, if `downsample`, a filter that halves."""

    def __init__(self, resnets: Sequence[AdaResnetBlock], downsample: bool) -> None:
        super().__init__(resnets)
        self.downsample = downsample

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what `DownBlock.forward` does; the halved result is not among the skips."""
        skips = []
        for resnet in self.resnets:
            x = self._run(resnet, x, emb)
            skips.append(x)
        return mirrored_halve(x) if self.downsample else x, skips


class MidBlock(Block):
    """A residual block, attention, if any, and another residual block."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self._run(self.resnets[1], x, emb)


class UpBlock(Block):
    """Residual blocks that read a skip each, each followed by attention, if any, then the upsampler, if any."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Attention],
        upsampler: Upsample | ResnetBlock | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the output; remove one skip per residual block from the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = self._run(resnet, x, emb, skips.pop())
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb) if isinstance(upsampler, ResnetBlock) else upsampler(x)
        return x


class SkipUpBlock(Block):
    """An `UpBlock` of NCSN++, with at most one attention, which also doubles the image and adds to it."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Attention],
        resnet_up: ResnetBlock | None,
        skip_norm: nn.GroupNorm | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.backend = "auto"
        self.resnet_up, self.skip_norm = resnet_up, skip_norm
        self.skip_conv = None if skip_norm is None else Conv3x3(skip_norm.num_channels, SKIP_IMAGE_CHANNELS)

    def forward(
        self, x: Tensor, emb: Tensor, skips: list[Tensor], image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `UpBlock.forward` does, and the image [N, 3, H, W], or None while no block has started one."""
        for resnet in self.resnets:
            x = self._run(resnet, x, emb, skips.pop())
        for attention in self.attentions:
            x = attention(x)
        if image is not None:
            image = fir_double(image)
        if self.resnet_up is not None and self.skip_norm is not None and self.skip_conv is not None:
            more = self.skip_conv(norm_silu(self.skip_norm, x, self.backend))
            image = more if image is None else image + more
            x = self.resnet_up(x, emb)
        return x, image


class KUpBlock(Block):
    """Residual blocks, the first of which reads a skip, then, if `upsample`, a filter that doubles."""

    def __init__(self, resnets: Sequence[AdaResnetBlock], upsample: bool) -> None:
        super().__init__(resnets)
        self.upsample = upsample

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the output; remove one skip per residual block from the end of `skips`, and read the last one only."""
        for i, resnet in enumerate(self.resnets):
            skip = skips.pop()
            x = self._run(resnet, x, emb, skip if i == 0 else None)
        return mirrored_double(x) if self.upsample else x


def norm_silu(
    norm: nn.GroupNorm,
    x: Tensor,
    backend: str,
    *,
    x2: Tensor | None = None,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Run `group_norm_silu` with the parameters of `norm`; `activation` may also be any of `ACTIVATIONS`."""
    if activation is not None and activation != "silu":
        more = {"x2": x2, "time_bias": time_bias, "scale": scale, "shift": shift}
        return ACTIVATIONS[activation](norm_silu(norm, x, backend, **more, activation=None))
    weight, bias = norm.weight, norm.bias
    if weight is None:
        weight, bias = x.new_ones(norm.num_channels), x.new_zeros(norm.num_channels)
    if backend == "native" or (backend == "auto" and norm.training):
        h, h2 = _as_autocast(x), None if x2 is None else _as_autocast(x2)
        many = x.numel() + (0 if x2 is None else x2.numel()) >= NATIVE_VALUES
        same = h2 is None or h2.dtype == h.dtype
        if backend == "native" or (many and same and not why_not("native", h.device.type, "group_norm_silu", h.dtype)):
            x, x2, backend = h, h2, "native"
    return group_norm_silu(
        x,
        weight,
        bias,
        norm.num_groups,
        eps=norm.eps,
        x2=x2,
        time_bias=time_bias,
        scale=scale,
        shift=shift,
        activation=activation,
        backend=backend,
    )


def _as_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype in which autocast computes on the CPU; without autocast x itself."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x
    return x.to(torch.get_autocast_dtype("cpu"))
