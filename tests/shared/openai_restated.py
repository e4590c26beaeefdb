"""guided-diffusion and improved-diffusion restated in a few functions, to compare with.

`Weights` is a state dict that draws what it lacks: running a network once writes a checkpoint of it. Networks are
functions of such weights; names and shapes of tensors are those of the published files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """Tensors by name, random ones where they are asked for first; none is 0, not even where training starts at 0."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(seed)

    def to(self, dtype: torch.dtype) -> Weights:
        """The same weights, rounded."""
        w = Weights(self.device, dtype)
        w.generator.set_state(self.generator.get_state())
        w.update((name, tensor.to(dtype)) for name, tensor in self.items())
        return w

    def draw(self, name: str, *shape: int, mean: float = 0.0, std: float | None = None) -> Tensor:
        if name not in self:
            if self.device == "meta":
                self[name] = torch.empty(shape, device="meta", dtype=self.dtype)
            else:
                std = math.prod(shape[1:]) ** -0.5 if std is None else std
                self[name] = mean + std * torch.randn(shape, generator=self.generator, dtype=self.dtype)
        assert tuple(self[name].shape) == shape, (name, shape)
        return self[name]

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self.draw(f"{name}.weight", out, x.shape[-1]), self.draw(f"{name}.bias", out, std=0.3))

    def conv(self, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1) -> Tensor:
        kernel = self.draw(f"{name}.weight", out, x.shape[1], *[size] * (x.ndim - 2))
        convolve = F.conv1d if x.ndim == 3 else F.conv2d
        return convolve(x, kernel, self.draw(f"{name}.bias", out, std=0.3), stride, padding=size // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        c = x.shape[1]
        scale, shift = self.draw(f"{name}.weight", c, mean=1.0, std=0.3), self.draw(f"{name}.bias", c, std=0.3)
        return F.group_norm(x, 32, scale, shift, 1e-5)


def time_embedding(w: Weights, t: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    h = w.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1).to(w.dtype), 4 * channels)
    return w.linear("time_embed.2", F.silu(h), 4 * channels)


def resblock(w: Weights, name: str, x: Tensor, emb: Tensor, out: int, film: bool, resample: str = "") -> Tensor:
    h = F.silu(w.norm(f"{name}.in_layers.0", x))
    if resample:
        change: Callable[[Tensor], Tensor] = down if resample == "down" else up
        h, x = change(h), change(x)
    h = w.conv(f"{name}.in_layers.2", h, out)
    e = w.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * out if film else out)
    e = e.view(*e.shape, *[1] * (x.ndim - 2))
    if film:
        scale, shift = e[:, :out], e[:, out:]
        h = w.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = w.norm(f"{name}.out_layers.0", h + e)
    h = w.conv(f"{name}.out_layers.3", F.silu(h), out)
    return h + (x if x.shape[1] == out else w.conv(f"{name}.skip_connection", x, out, 1))


def down(x: Tensor) -> Tensor:
    if x.ndim == 3:
        return (x[..., ::2] + x[..., 1::2]) / 2
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2) if x.ndim == 3 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """[N, 3C, T] -> [N, C, T], one head after the other."""
    width = qkv.shape[1] // 3
    channels, out = width // heads, []
    for head in range(heads):
        starts = [i * width + head * channels if new_order else (3 * head + i) * channels for i in range(3)]
        q, k, v = (qkv[:, start : start + channels] for start in starts)
        weight = torch.softmax(torch.einsum("nct,ncs->nts", q, k) / math.sqrt(channels), dim=-1)
        out.append(torch.einsum("nts,ncs->nct", weight, v))
    return torch.cat(out, 1)


def attention(w: Weights, name: str, x: Tensor, heads: int, new_order: bool) -> Tensor:
    flat = x.flatten(2)
    h = attend(w.conv(f"{name}.qkv", w.norm(f"{name}.norm", flat), 3 * x.shape[1], 1), heads, new_order)
    return (flat + w.conv(f"{name}.proj_out", h, x.shape[1], 1)).view_as(x)


def encoder(
    w: Weights, x: Tensor, emb: Tensor, *, channels: int, mult: Sequence[float], layers: int, reductions: Sequence[int],
    film: bool, updown: bool, heads: Callable[[int], int], new_order: bool = False, conv_resample: bool = True,
) -> list[Tensor]:  # fmt: skip
    """What every input block and the middle block return."""
    x = w.conv("input_blocks.0.0", x, int(mult[0] * channels))
    results, number = [x], 1
    for level, multiple in enumerate(mult):
        for _ in range(layers):
            x = resblock(w, f"input_blocks.{number}.0", x, emb, int(multiple * channels), film)
            if 2**level in reductions:
                x = attention(w, f"input_blocks.{number}.1", x, heads(x.shape[1]), new_order)
            results, number = [*results, x], number + 1
        if level < len(mult) - 1:
            if updown:
                x = resblock(w, f"input_blocks.{number}.0", x, emb, x.shape[1], film, "down")
            else:
                x = w.conv(f"input_blocks.{number}.0.op", x, x.shape[1], 3, 2) if conv_resample else down(x)
            results, number = [*results, x], number + 1
    x = resblock(w, "middle_block.0", x, emb, x.shape[1], film)
    x = attention(w, "middle_block.1", x, heads(x.shape[1]), new_order)
    return [*results, resblock(w, "middle_block.2", x, emb, x.shape[1], film)]


def unet_model(
    w: Weights, x: Tensor, t: Tensor, y: Tensor | None = None, *, channels: int, mult: Sequence[float], layers: int,
    reductions: Sequence[int], out: int = 3, classes: int = 1000, heads: int = 4, heads_upsample: int = -1,
    head_channels: int = -1, film: bool = True, updown: bool = False, new_order: bool = False,
    conv_resample: bool = True,
) -> Tensor:  # fmt: skip
    """`UNetModel`, with shorter names of its arguments."""
    emb = time_embedding(w, t, channels)
    if y is not None:
        emb = emb + w.draw("label_emb.weight", classes, 4 * channels)[y]

    def number_of(own: int) -> Callable[[int], int]:
        return lambda width: own if head_channels == -1 else width // head_channels

    *skips, x = encoder(
        w, x, emb, channels=channels, mult=mult, layers=layers, reductions=reductions, film=film, updown=updown,
        heads=number_of(heads), new_order=new_order, conv_resample=conv_resample,
    )  # fmt: skip
    upper, number = number_of(heads if heads_upsample == -1 else heads_upsample), 0
    for level in reversed(range(len(mult))):
        width = int(mult[level] * channels)
        for index in range(layers + 1):
            name = f"output_blocks.{number}"
            x = resblock(w, f"{name}.0", torch.cat([x, skips.pop()], 1), emb, width, film)
            if attends := 2**level in reductions:
                x = attention(w, f"{name}.1", x, upper(width), new_order)
            if level and index == layers:
                last = f"{name}.{1 + attends}"
                if updown:
                    x = resblock(w, last, x, emb, width, film, "up")
                else:
                    x = w.conv(f"{last}.conv", up(x), width) if conv_resample else up(x)
            number += 1
    return w.conv("out.2", F.silu(w.norm("out.0", x)), out)


def super_res_model(
    w: Weights, x: Tensor, t: Tensor, low_res: Tensor, y: Tensor | None = None, **options: Any
) -> Tensor:
    """`SuperResModel`: it reads the small images, enlarged, after x."""
    larger = F.interpolate(low_res, x.shape[2:], mode="bilinear")
    return unet_model(w, torch.cat([x, larger], 1), t, y, **options)


def encoder_model(
    w: Weights, x: Tensor, t: Tensor, *, channels: int, mult: Sequence[float], layers: int, reductions: Sequence[int],
    pool: str, film: bool = True, updown: bool = True, classes: int = 1000,
) -> Tensor:  # fmt: skip
    """`EncoderUNetModel` as `create_classifier` makes it, with heads of 64 channels: the logits."""
    results = encoder(
        w, x, time_embedding(w, t, channels), channels=channels, mult=mult, layers=layers, reductions=reductions,
        film=film, updown=updown, heads=lambda width: width // 64,
    )  # fmt: skip
    if pool.startswith("spatial"):
        h = w.linear("out.0", torch.cat([result.mean((2, 3)) for result in results], 1), 2048)
        h = F.silu(w.norm("out.1", h)) if pool == "spatial_v2" else F.relu(h)
        return w.linear("out.3" if pool == "spatial_v2" else "out.2", h, classes)
    h = F.silu(w.norm("out.0", results[-1]))
    if pool == "adaptive":
        return w.conv("out.3", h.mean((2, 3), keepdim=True), classes, 1).flatten(1)
    h = h.flatten(2)
    h = torch.cat([h.mean(2, keepdim=True), h], 2)
    h = h + w.draw("out.2.positional_embedding", *h.shape[1:], std=0.3)
    h = attend(w.conv("out.2.qkv_proj", h, 3 * h.shape[1], 1), h.shape[1] // 64, new_order=True)
    return w.conv("out.2.c_proj", h, classes, 1)[:, :, 0]


class Diffusion:
    """`SpacedDiffusion` in float64: the loops over the timesteps that a respacing keeps, at given noise."""

    def __init__(
        self, betas: np.ndarray, kept: Sequence[int], *, predicts: str = "epsilon", variance: str = "fixed_large",
        rescale: bool = False,
    ) -> None:  # fmt: skip
        bars = np.cumprod(1 - betas)[sorted(kept)]
        self.kept, self.scale, self.predicts, self.variance = sorted(kept), 1000.0 / len(betas), predicts, variance
        self.rescale = rescale
        self.betas = 1 - bars / np.append(1.0, bars[:-1])
        self.bar = np.cumprod(1 - self.betas)
        self.before = np.append(1.0, self.bar[:-1])
        self.posterior = self.betas * (1 - self.before) / (1 - self.bar)
        self.log_clipped = np.log(np.append(self.posterior[1], self.posterior[1:]))

    def told(self, step: int, count: int) -> Tensor:
        t = torch.full((count,), self.kept[step])
        return t.float() * self.scale if self.rescale else t

    def moments(self, step: int, x: Tensor, out: Tensor, clip: bool) -> tuple[Tensor, Any, Any]:
        """x0, the variance of the step, and its logarithm as noise has it."""
        variance = log_variance = None
        if self.variance == "learned_range":
            out, v = out.chunk(2, 1)
            fraction = (v + 1) / 2
            log_variance = fraction * np.log(self.betas[step]) + (1 - fraction) * self.log_clipped[step]
            variance = log_variance.exp()
        elif self.variance == "fixed_large":
            variance = np.append(self.posterior[1], self.betas[1:])[step]
            log_variance = torch.tensor(np.log(variance))
        else:
            variance, log_variance = self.posterior[step], torch.tensor(self.log_clipped[step])
        x0 = out
        if self.predicts == "epsilon":
            x0 = np.sqrt(1 / self.bar[step]) * x - np.sqrt(1 / self.bar[step] - 1) * out
        return (x0.clamp(-1, 1) if clip else x0), variance, log_variance

    def p_sample_loop(
        self, model: Callable[..., Tensor], x: Tensor, noise: Tensor, *, clip: bool = True,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        for row, step in enumerate(reversed(range(len(self.kept)))):
            t = self.told(step, len(x))
            x0, variance, log_variance = self.moments(step, x, model(x, t), clip)
            bar, before, beta = self.bar[step], self.before[step], self.betas[step]
            mean = beta * np.sqrt(before) / (1 - bar) * x0 + (1 - before) * np.sqrt(1 - beta) / (1 - bar) * x
            if cond_fn is not None:
                mean = mean + variance * cond_fn(x, t)
            x = mean + (0 if step == 0 else 1) * (0.5 * log_variance).exp() * noise[row]
        return x

    def ddim_sample_loop(
        self, model: Callable[..., Tensor], x: Tensor, noise: Tensor, *, clip: bool = True, eta: float = 0.0,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        for row, step in enumerate(reversed(range(len(self.kept)))):
            t = self.told(step, len(x))
            x0, _, _ = self.moments(step, x, model(x, t), clip)
            bar, before = self.bar[step], self.before[step]
            if cond_fn is not None:
                eps = (np.sqrt(1 / bar) * x - x0) / np.sqrt(1 / bar - 1) - np.sqrt(1 - bar) * cond_fn(x, t)
                x0 = np.sqrt(1 / bar) * x - np.sqrt(1 / bar - 1) * eps
            eps = (np.sqrt(1 / bar) * x - x0) / np.sqrt(1 / bar - 1)
            sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
            x = x0 * np.sqrt(before) + np.sqrt(1 - before - sigma**2) * eps
            x = x + (0 if step == 0 else 1) * sigma * noise[row]
        return x
