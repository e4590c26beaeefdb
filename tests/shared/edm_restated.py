"""EDM's and PhysicsNeMo's networks and samplers, restated from their papers and the names of their layers.

Both libraries are recognised by the names of classes and modules, so these classes have theirs: `EDM` holds those of
NVlabs' edm, `PHYSICSNEMO` those of NVIDIA's physicsnemo. Other than the libraries, they compute in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT_HALF = math.sqrt(0.5)


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(0.2 * torch.randn(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, up: bool = False, down: bool = False,
        taps: tuple[int, ...] = (1, 1), fused_resample: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        self.fused_resample = fused_resample
        fan = max(in_channels * kernel**2, 1)
        weight = torch.randn(out_channels, in_channels, kernel, kernel) / fan**0.5
        self.weight = nn.Parameter(weight) if kernel else None
        self.bias = nn.Parameter(0.2 * torch.randn(out_channels)) if kernel else None
        one = torch.tensor(taps, dtype=torch.float32)
        both = (one[:, None] * one / one.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", both if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        channels, pad = x.shape[1], 0 if self.weight is None else self.weight.shape[-1] // 2
        taps = self.resample_filter
        if taps is not None:
            edge = (taps.shape[-1] - 1) // 2
            if self.fused_resample:  # convolve an image that is wider by the filter's edge, then filter
                wide = F.conv2d(x, self.weight, padding=pad + edge)
                kernel = taps.expand(self.out_channels, -1, -1, -1)
                return F.conv2d(wide, kernel, self.bias, stride=2, groups=self.out_channels)
            kernel = taps.expand(channels, -1, -1, -1)
            run = {"stride": 2, "padding": edge, "groups": channels}
            x = F.conv_transpose2d(x, 4 * kernel, **run) if self.up else F.conv2d(x, kernel, **run)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=pad)


class GroupNorm(nn.Module):
    unbiased = False

    def __init__(self, channels: int, eps: float, act: str | None = None) -> None:
        super().__init__()
        self.num_groups, self.eps, self.act = min(32, channels // 4), eps, act
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(channels))
        self.bias = nn.Parameter(0.2 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(groups, (2, 3, 4), correction=int(self.unbiased), keepdim=True)
        y = ((groups - mean) / (variance + self.eps).sqrt()).flatten(1, 2)
        y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return F.silu(y) if self.act == "silu" else y


class PositionalEmbedding(nn.Module):
    def __init__(self, num_channels: int, endpoint: bool) -> None:
        super().__init__()
        self.num_channels, self.endpoint, self.max_positions = num_channels, endpoint, 10000

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_channels // 2
        powers = torch.arange(half, dtype=torch.float32) / (half - int(self.endpoint))
        angles = torch.outer(t, ((1 / self.max_positions) ** powers).to(t.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num_channels // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.outer(t, (2 * math.pi * self.freqs).to(t.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def attended(x: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """Channels are [head, channel, (q, k, v)]."""
    q, k, v = qkv.reshape(len(x), heads, x.shape[1] // heads, 3, -1).unbind(3)
    weights = (torch.einsum("nhcq,nhck->nhqk", q, k) / q.shape[2] ** 0.5).softmax(-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)


class UNetAttention(nn.Module):  # PhysicsNeMo's
    def __init__(self, lib: Any, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.norm = heads, lib.GroupNorm(channels, eps)
        self.qkv, self.proj = lib.Conv2d(channels, 3 * channels, 1), lib.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(attended(x, self.qkv(self.norm(x)), self.num_heads))


class UNetBlock(nn.Module):
    def __init__(
        self, lib: Any, in_channels: int, out_channels: int, emb: int, *, up: bool = False, down: bool = False,
        heads: int = 0, scale: float = 1.0, eps: float = 1e-5, taps: tuple[int, ...] = (1, 1), proj: bool = False,
        adaptive: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads = in_channels, out_channels, heads
        self.skip_scale, self.adaptive_scale = scale, adaptive
        act = "silu" if lib.fused else None
        self.norm0 = lib.GroupNorm(in_channels, eps, act)
        self.conv0 = lib.Conv2d(in_channels, out_channels, 3, up, down, taps)
        self.affine = lib.Linear(emb, out_channels * (2 if adaptive else 1))
        self.norm1 = lib.GroupNorm(out_channels, eps, None if adaptive else act)
        self.conv1 = lib.Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if proj or out_channels != in_channels else 0
            self.skip = lib.Conv2d(in_channels, out_channels, kernel, up, down, taps)
        if lib.fused:
            self.attn = UNETATTENTION(lib, out_channels, heads, eps) if heads else None
        elif heads:
            self.norm2 = lib.GroupNorm(out_channels, eps)
            self.qkv = lib.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = lib.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        def active(v: Tensor) -> Tensor:
            return v if self.norm0.act else F.silu(v)

        h = self.conv0(active(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            gain, shift = params.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (gain + 1) + shift)
        else:
            h = active(self.norm1(h + params))
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if getattr(self, "attn", None) is not None:
            return self.attn(x) * self.skip_scale
        if self.num_heads and hasattr(self, "qkv"):
            x = (x + self.proj(attended(x, self.qkv(self.norm2(x)), self.num_heads))) * self.skip_scale
        return x


class SongUNet(nn.Module):
    lib: Any

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, model_channels: int = 8,
        channel_mult: tuple[int, ...] = (1, 2), num_blocks: int = 1, attn_resolutions: tuple[int, ...] = (4,),
        embedding_type: str = "positional", channel_mult_noise: int = 1, encoder_type: str = "standard",
        decoder_type: str = "standard", resample_filter: tuple[int, ...] = (1, 1), **of_adm: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        lib, emb, noise, taps = self.lib, 4 * model_channels, model_channels * channel_mult_noise, resample_filter
        self.label_dim, self.emb_channels, self.img_resolution = label_dim, emb, img_resolution
        if embedding_type == "zero":
            self.register_buffer("zero_emb", torch.zeros(1, emb), persistent=False)
        else:
            fourier = embedding_type == "fourier"
            self.map_noise = lib.FourierEmbedding(noise) if fourier else lib.PositionalEmbedding(noise, True)
            self.map_label = lib.Linear(label_dim, noise) if label_dim else None
            self.map_layer0, self.map_layer1 = lib.Linear(noise, emb), lib.Linear(emb, emb)

        def block(cin: int, cout: int, **more: Any) -> nn.Module:
            return lib.UNetBlock(
                lib, cin, cout, emb, scale=ROOT_HALF, eps=1e-6, taps=taps, proj=True, adaptive=False, **more
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout = aux = in_channels
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            if level == 0:
                cin, cout = cout, model_channels
                self.enc[f"{size}x{size}_conv"] = lib.Conv2d(cin, cout, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(cout, cout, down=True)
                if encoder_type == "skip":
                    self.enc[f"{size}x{size}_aux_down"] = lib.Conv2d(aux, aux, 0, down=True, taps=taps)
                    self.enc[f"{size}x{size}_aux_skip"] = lib.Conv2d(aux, cout, 1)
                elif encoder_type == "residual":
                    self.enc[f"{size}x{size}_aux_residual"] = lib.Conv2d(aux, cout, 3, False, True, taps, True)
                    aux = cout
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{size}x{size}_block{index}"] = block(cin, cout, heads=int(size in attn_resolutions))
        skips = [one.out_channels for name, one in self.enc.items() if "aux" not in name]
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = block(cout, cout, heads=1)
                self.dec[f"{size}x{size}_in1"] = block(cout, cout)
            else:
                self.dec[f"{size}x{size}_up"] = block(cout, cout, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                heads = int(index == num_blocks and size in attn_resolutions)
                self.dec[f"{size}x{size}_block{index}"] = block(cin, cout, heads=heads)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    self.dec[f"{size}x{size}_aux_up"] = lib.Conv2d(out_channels, out_channels, 0, up=True, taps=taps)
                self.dec[f"{size}x{size}_aux_norm"] = lib.GroupNorm(cout, 1e-6)
                self.dec[f"{size}x{size}_aux_conv"] = lib.Conv2d(cout, out_channels, 3)

    def embedded(self, t: Tensor, labels: Tensor | None) -> Tensor:
        if hasattr(self, "zero_emb"):
            return self.zero_emb.expand(len(t), -1)
        cosine, sine = self.map_noise(t).chunk(2, dim=1)
        emb = torch.cat([sine, cosine], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(labels * self.label_dim**0.5)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb, skips, aux = self.embedded(noise_labels, class_labels), [], x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * ROOT_HALF
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        out: Any = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                normed = F.silu(layer(x))
            elif "aux_conv" in name:
                out = layer(normed) if out is None else out + layer(normed)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if x.shape[1] != layer.in_channels else x, emb)
        return out


class SongUNetPosEmbd(SongUNet):
    """PhysicsNeMo's: learned channels of the positions, and of the lead time, beside those of the input."""

    def __init__(
        self, *sizes: int, N_grid_channels: int = 0, lead_time_channels: int = 0, prob_channels: tuple[int, ...] = (),
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(*sizes, **more)
        size = self.img_resolution
        self.img_shape_y = self.img_shape_x = size
        self.pos_embd = nn.Parameter(torch.randn(N_grid_channels, size, size)) if N_grid_channels else None
        self.lead_time_mode, self.prob_channels = lead_time_channels > 0, list(prob_channels)
        self.lt_embd = nn.Parameter(torch.randn(3, lead_time_channels, size, size)) if lead_time_channels else None
        self.scalar = nn.Parameter(1 + torch.rand(1, len(prob_channels), 1, 1)) if prob_channels else None

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None, lead_time_label: Tensor | None = None
    ) -> Tensor:
        if self.pos_embd is not None:
            x = torch.cat([x, self.pos_embd.to(x).expand(len(x), -1, -1, -1)], dim=1)
        if self.lt_embd is not None and lead_time_label is not None:
            x = torch.cat([x, self.lt_embd.to(x)[lead_time_label].expand(len(x), -1, -1, -1)], dim=1)
        out = super().forward(x, noise_labels, class_labels)
        if self.prob_channels:
            out[:, self.prob_channels] = (out[:, self.prob_channels] * self.scalar).softmax(dim=1)
        return out


class DhariwalUNet(SongUNet):
    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, model_channels: int = 8,
        channel_mult: tuple[int, ...] = (1, 2), num_blocks: int = 1, attn_resolutions: tuple[int, ...] = (4,),
        channels_per_head: int = 64,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        lib, emb = self.lib, 4 * model_channels
        self.label_dim, self.img_resolution = label_dim, img_resolution
        self.map_noise = lib.PositionalEmbedding(model_channels, False)
        self.map_layer0, self.map_layer1 = lib.Linear(model_channels, emb), lib.Linear(emb, emb)
        self.map_label = lib.Linear(label_dim, emb, bias=False) if label_dim else None

        def block(cin: int, cout: int, attends: bool = False, **more: Any) -> nn.Module:
            return lib.UNetBlock(lib, cin, cout, emb, heads=cout // channels_per_head if attends else 0, **more)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout = in_channels
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            if level == 0:
                cin, cout = cout, model_channels * mult
                self.enc[f"{size}x{size}_conv"] = lib.Conv2d(cin, cout, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(cout, cout, down=True)
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{size}x{size}_block{index}"] = block(cin, cout, size in attn_resolutions)
        skips = [one.out_channels for one in self.enc.values()]
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = block(cout, cout, True)
                self.dec[f"{size}x{size}_in1"] = block(cout, cout)
            else:
                self.dec[f"{size}x{size}_up"] = block(cout, cout, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                self.dec[f"{size}x{size}_block{index}"] = block(cin, cout, size in attn_resolutions)
        self.out_norm, self.out_conv = lib.GroupNorm(cout, 1e-5), lib.Conv2d(cout, out_channels, 3)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise_labels))))
        emb, skips = F.silu(emb if self.map_label is None else emb + self.map_label(class_labels)), []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            x = layer(torch.cat([x, skips.pop()], 1) if x.shape[1] != layer.in_channels else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


# -- preconditioners -------------------------------------------------------------------------------------------------


class Precond(nn.Module):
    def __init__(self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int = 0) -> None:
        super().__init__()
        self.model, self.img_resolution = model, img_resolution
        self.img_channels, self.label_dim = img_channels, label_dim
        self.sigma_min, self.sigma_max, self.use_fp16 = 0.0, math.inf, False

    def coefficients(self, sigma: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **more: Any) -> Tensor:
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            labels = torch.zeros(1, self.label_dim) if class_labels is None else class_labels.float()
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out = self.model(c_in * x, c_noise.flatten(), class_labels=labels, **more)
        return c_skip * x + c_out * out[:, : x.shape[1]]


class EDMPrecond(Precond):
    sigma_data = 0.5

    def coefficients(self, sigma: Tensor) -> tuple[Any, ...]:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class VPPrecond(Precond):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.beta_d, self.beta_min, self.M = 19.9, 0.1, 1000
        self.sigma_min, self.sigma_max = (float(self.sigma(torch.tensor(t))) for t in (1e-5, 1.0))

    def sigma(self, t: Tensor) -> Tensor:
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> tuple[Any, ...]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Precond):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sigma_min, self.sigma_max = 0.02, 100

    def coefficients(self, sigma: Tensor) -> tuple[Any, ...]:
        return 1, sigma, 1, (0.5 * sigma).log()


class iDDPMPrecond(Precond):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.M, levels = 1000, [0.0]
        bar = (0.5 * math.pi * torch.arange(1001) / 1000 / 1.008).sin().square()
        for j in range(1000, 0, -1):
            levels.insert(0, math.sqrt((levels[0] ** 2 + 1) / max(float(bar[j - 1] / bar[j]), 0.001) - 1))
        self.register_buffer("u", torch.tensor(levels))
        self.sigma_min, self.sigma_max = levels[999], levels[0]

    def round_sigma(self, sigma: Any, return_index: bool = False) -> Tensor:
        sigma = torch.as_tensor(sigma)
        index = (sigma.float().reshape(-1, 1) - self.u).abs().argmin(1).reshape(sigma.shape)
        return index if return_index else self.u[index].to(sigma.dtype)

    def coefficients(self, sigma: Tensor) -> tuple[Any, ...]:
        index = self.round_sigma(sigma, return_index=True)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), self.M - 1 - index.float()


class EDMPrecondSuperResolution(EDMPrecond):  # PhysicsNeMo's, for CorrDiff
    def __init__(self, model: nn.Module, img_resolution: int, img_in_channels: int, img_out_channels: int) -> None:
        super().__init__(model, img_resolution, img_out_channels)
        self.img_in_channels, self.img_out_channels = img_in_channels, img_out_channels

    def forward(self, x: Tensor, img_lr: Tensor, sigma: Tensor, force_fp32: bool = False, **more: Any) -> Tensor:
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        arg = torch.cat([c_in * x, img_lr.float()], dim=1)
        return c_skip * x + c_out * self.model(arg, c_noise.flatten(), class_labels=None, **more)


class CorrDiffRegressionUNet(nn.Module):
    def __init__(self, model: nn.Module, img_resolution: int, img_in_channels: int, img_out_channels: int) -> None:
        super().__init__()
        self.model, self.img_in_channels, self.img_out_channels = model, img_in_channels, img_out_channels

    def forward(self, x: Tensor, img_lr: Tensor, force_fp32: bool = False, **more: Any) -> Tensor:
        arg = torch.cat([x, img_lr], dim=1).float()
        return self.model(arg, torch.zeros(len(x)), class_labels=None, **more)


def _library(module: str, *, physicsnemo: bool) -> SimpleNamespace:
    lib = SimpleNamespace(fused=physicsnemo)
    bases: tuple[type, ...] = (
        Linear, Conv2d, GroupNorm, PositionalEmbedding, FourierEmbedding, UNetAttention, UNetBlock, SongUNet,
        SongUNetPosEmbd, DhariwalUNet, EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, EDMPrecondSuperResolution,
        CorrDiffRegressionUNet,
    )  # fmt: skip
    for base in bases:
        of_lib = {"__module__": module, "lib": lib, "unbiased": physicsnemo}
        setattr(lib, base.__name__, type(base.__name__, (base,), of_lib))
    return lib


EDM = _library("training.networks", physicsnemo=False)
PHYSICSNEMO = _library("physicsnemo.models.diffusion_unets.song_unet", physicsnemo=True)
UNETATTENTION = PHYSICSNEMO.UNetAttention


# -- samplers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heun(
    denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor], *, churn: float = 0.0, low: float = 0.0, high: float = math.inf,
    noise: float = 1.0,
    rounded: Callable[[Tensor], Tensor] = lambda sigma: sigma, bound: float = math.sqrt(2) - 1, solver: str = "heun",
) -> Tensor:  # fmt: skip
    """Karras et al. 2022, algorithm 2, in the dtype of the latents; `sigmas` end with 0."""
    count, x = len(sigmas) - 1, latents * sigmas[0]
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        gamma = min(churn / count, bound) if low <= sigma <= high else 0.0
        hat = rounded(sigma * (1 + gamma))
        x = x + (hat**2 - sigma**2).clip(min=0).sqrt() * noise * randn_like(x)
        slope = (x - denoise(x, hat).to(x.dtype)) / hat
        there = x + (after - hat) * slope
        if i < count - 1 and solver == "heun":
            second = (there - denoise(there, after).to(x.dtype)) / after
            there = x + (after - hat) * (slope + second) / 2
        x = there
    return x


@torch.no_grad()
def of_paths(
    denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, sigmas: Tensor, *, schedule: str, scaling: str,
    solver: str, alpha: float, beta_d: float, beta_min: float,
) -> Tensor:  # fmt: skip
    """Karras et al. 2022, eq. 4 with sigma(t) and s(t) of table 1, without churn; slopes by autograd."""
    table = {
        "ve": (lambda t: t.sqrt(), lambda sigma: sigma**2),
        "linear": (lambda t: t, lambda sigma: sigma),
        "vp": (
            lambda t: ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt(),
            lambda sigma: ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d,
        ),
    }
    level, inverse = table[schedule]

    def scale(t: Tensor) -> Tensor:
        return (1 + level(t) ** 2).rsqrt() if scaling == "vp" else torch.ones_like(t)

    def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        with torch.enable_grad():
            at = t.clone().requires_grad_()
            return torch.autograd.grad(function(at) + 0 * at, at)[0]

    def slope(x: Tensor, t: Tensor) -> Tensor:
        sigma, s = level(t), scale(t)
        rate = derivative(level, t) / sigma
        return (rate + derivative(scale, t) / s) * x - rate * s * denoise(x / s, sigma).to(x.dtype)

    times = torch.cat([inverse(sigmas), torch.zeros(1, dtype=sigmas.dtype)])
    x = latents * level(times[0]) * scale(times[0])
    for i, (t, after) in enumerate(pairwise(times)):
        first, h = slope(x, t), after - t
        if solver == "euler" or i == len(times) - 2:
            x = x + h * first
        else:
            second = slope(x + alpha * h * first, t + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * first + second / (2 * alpha))
    return x


# -- comparing -------------------------------------------------------------------------------------------------------


def drawing(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert error <= tolerance, f"differs by {error:.1e} of the rms"
