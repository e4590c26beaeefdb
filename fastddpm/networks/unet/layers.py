"""The layers of the compact U-Net (`unet.py`), with the parameter names of diffusers' UNet2DModel.

An `nn.GroupNorm` here only holds parameters: each normalisation runs as one `group_norm_silu`, fused with
what surrounds it (the skip concatenation, the time embedding, SiLU). A layer's `backend` says which backend
that op, the 3x3 convolutions and attention use; `UNet.backend` sets it everywhere. "auto" is "native" in training mode
on a CPU that has a compiler, for the layers that are large enough, in float32 and, where the CPU multiplies that, under
autocast to bfloat16; in evaluation mode torch's own, of the least error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastddpm_kernels.attention import training as attention_training
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv.training import conv3x3, resolve_conv3x3
from fastddpm_kernels.group_norm_silu import group_norm_silu
from torch import Tensor, nn

# From how many channels on, of inputs and of outputs, a native 3x3 convolution trains faster than torch's, and from how
# many values on a native norm does (benchmarks/NOTES.md).
NATIVE_CHANNELS = {torch.float32: 16, torch.bfloat16: 64}
NATIVE_VALUES = 2**17


def timestep_embedding(
    t: Tensor, channels: int, *, flip_sin_to_cos: bool, freq_shift: float, scale: float = 1.0
) -> Tensor:
    """Sinusoids of the timestep (Ho et al. 2020, after Vaswani et al. 2017): float32 [N, channels].

    Of half = channels // 2 frequencies, number i is 10000 ** (-i / (half - freq_shift)). An odd last channel
    is 0.

    Args:
        t: timesteps [N], integer or (for models trained so) real; computed in float32, the precision that the
            published models were trained with.
        channels: how many values per timestep.
        flip_sin_to_cos: [cos, sin] instead of [sin, cos].
        freq_shift: 1 makes the last frequency exactly 1 / 10000 (the original DDPM); 0 stops one short of it.
        scale: a factor of the timesteps, multiplied in float32.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = (t.float() * scale)[:, None] * torch.exp(exponent / (half - freq_shift))[None, :]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear: from sinusoids [N, in_channels] to an embedding [N, channels]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1, by the fewest multiplications that the backend knows."""

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

    The embedding, projected, is added before the second norm, or (`scale_shift`) applied after it, as
    norm2 * (1 + scale) + shift. With `resample` "down" or "up" what conv1 and shortcut read is pooled or upsampled by
    two first.
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
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block's output [N, out_channels, H, W], of half or twice the size where it resamples.

        Args:
            x: [N, C, H, W].
            emb: SiLU of the time (and class) embedding, [N, emb_channels].
            skip: [N, in_channels - C, H, W], as if concatenated to `x`.
        """
        h = norm_silu(self.norm1, x, self.backend, x2=skip)
        if self.resample is not None:
            assert skip is None  # no U-Net has such a block
            resample = halve if self.resample == "down" else double
            h, x = resample(h), resample(x)
        h = self.conv1(h)
        time = self.time_emb_proj(emb)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm_silu(self.norm2, h, self.backend, scale=scale, shift=shift)
        else:
            h = norm_silu(self.norm2, h, self.backend, time_bias=time)
        h = self.conv2(self.dropout(h))
        y = self._shortcut(x, skip) + h
        return y if self.output_scale == 1 else y / self.output_scale

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.conv_shortcut is None:
            return x if skip is None else torch.cat([x, skip], dim=1)
        if skip is None:
            return self.conv_shortcut(x)
        # A 1x1 convolution of a concatenation is the sum over its parts: the concatenation need not exist.
        first, second = self.conv_shortcut.weight.split([x.shape[1], skip.shape[1]], dim=1)
        return F.conv2d(x, first, self.conv_shortcut.bias) + F.conv2d(skip, second)


class Attention(nn.Module):
    """Self-attention over the pixels, with residual: (x + to_out(attend(norm(x)))) / output_scale.

    `channels // head_dim` heads of `head_dim` channels; one head of all channels where `head_dim` is None.
    Without norm where `groups` is None.
    """

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
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        h = x if self.group_norm is None else norm_silu(self.group_norm, x, self.backend, activation=None)
        h = h.flatten(2).transpose(1, 2)  # [N, pixels, C], a view where x is channels-last
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        backend = "native" if self.backend == "native" else "eager"
        if self.backend == "auto" and self.training:
            backend = attention_training.resolve_attention(q, k, v, self.heads)
        h = attention_training.attention(q, k, v, self.heads, backend=backend)
        h = self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])
        y = x + h
        return y if self.output_scale == 1 else y / self.output_scale


def halve(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H / 2, W / 2]: means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]: every pixel four times."""
    if 4 * x.numel() >= 2**31:  # beyond this, channels-last, CUDA returns zeros (pytorch issue 141831)
        x = x.contiguous()
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """3x3 convolution of stride 2; `padding` 0 pads right and bottom only, by one, as the original DDPM.

    Means of 2x2 pixels where `padding` is None.
    """

    def __init__(self, channels: int, padding: int | None) -> None:
        super().__init__()
        self.padding = padding
        self.conv = None if padding is None else nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return halve(x)
        # Under autocast x is of the dtype of the 3x3 convolutions before, and so must all be that skips end in.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x).to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution unless `convolve` is False."""

    def __init__(self, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        x = double(x)
        return x if self.conv is None else self.conv(x)


class DownBlock(nn.Module):
    """Residual blocks, each followed by attention if there are `attentions`, then the downsampler if any."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Attention],
        downsampler: Downsample | ResnetBlock | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and every intermediate result that the up blocks take up again, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, emb) if isinstance(downsampler, ResnetBlock) else downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """A residual block, attention if any, a residual block."""

    def __init__(self, resnets: Sequence[ResnetBlock], attentions: Sequence[Attention]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Residual blocks that take up a skip each, attention after each if any, then the upsampler if any."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Attention],
        upsampler: Upsample | ResnetBlock | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """The output; takes one skip per residual block off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, skips.pop())
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb) if isinstance(upsampler, ResnetBlock) else upsampler(x)
        return x


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
    """`group_norm_silu` with the parameters of `norm`; see there."""
    if backend == "native" or (backend == "auto" and norm.training):
        h, h2 = _as_autocast(x), None if x2 is None else _as_autocast(x2)
        many = x.numel() + (0 if x2 is None else x2.numel()) >= NATIVE_VALUES
        same = h2 is None or h2.dtype == h.dtype
        if backend == "native" or (many and same and not why_not("native", h.device.type, "group_norm_silu", h.dtype)):
            x, x2, backend = h, h2, "native"
    return group_norm_silu(
        x,
        norm.weight,
        norm.bias,
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
    """x in the dtype in which autocast computes on the CPU; without autocast x itself."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x
    return x.to(torch.get_autocast_dtype("cpu"))
