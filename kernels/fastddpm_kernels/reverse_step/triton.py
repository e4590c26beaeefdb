"""Compute the reverse step in one kernel, shared by the functional and the in-place op.

Pointers that are None switch their part off at compile time. Values that a sampling loop changes between steps are read
from device memory: the step index, then its row of the table, the keys, the guidance scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.strided import (
    AOT,
    MOST_BLOCK,
    aot,
    block_and_warps,
    elements,
    num_programs,
    offsets,
    run,
    walkable,
)
from fastddpm_kernels.device.variant import Launch, Variant, packaged_variants
from fastddpm_kernels.layout import Strides
from fastddpm_kernels.philox import STREAM_KNOWN, STREAM_STEP
from fastddpm_kernels.philox.triton import normals
from fastddpm_kernels.reverse_step.formula import Options


@triton.jit
def _entry(table, row, column, COLUMNS: tl.constexpr, valid):
    return tl.load(table + row * COLUMNS + column, mask=valid, other=float("nan"))


@triton.jit
def _reverse_step(
    x_next, x0, net_in, x, out, table, step, keys, noise, x0_prev, history, log_variance, guidance_scale,
    known, known_mask, known_table, known_noise, threshold,
    clip_range, batch, numel, P, num_steps, v_offset,
    out_sample, out_channel, out_pixel, net_sample, net_channel, net_pixel,
    known_sample, known_channel, known_pixel, mask_sample, mask_channel, mask_pixel,
    OUT_LINEAR: tl.constexpr, NET_LINEAR: tl.constexpr, KNOWN_LINEAR: tl.constexpr, MASK_LINEAR: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, STREAM: tl.constexpr, KNOWN_STREAM: tl.constexpr, BLOCK: tl.constexpr,
    HISTORY: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = 7 + HISTORY
    blocks = tl.cdiv(numel, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    element = elements(first, BLOCK)
    mask = element < numel
    here = n * numel + element

    # All wide loads come first, so that making the noise hides their latency.
    x_t = tl.load(x + here, mask=mask)
    at = offsets(n, first, out_sample, out_channel, out_pixel, P, OUT_LINEAR, FOURS, BLOCK)
    prediction = tl.load(out + at, mask=mask).to(tl.float32)
    if guidance_scale is not None:
        # The conditional half.
        at = offsets(n + batch, first, out_sample, out_channel, out_pixel, P, OUT_LINEAR, FOURS, BLOCK)
        conditional = tl.load(out + at, mask=mask).to(tl.float32)
        scale = tl.load(guidance_scale + n * SCALE_STRIDE)
        prediction = tl.fma(scale, conditional - prediction, prediction)
    if log_variance is not None:
        v = tl.load(out + at + v_offset, mask=mask).to(tl.float32)

    row = tl.load(step)
    valid = (row >= 0) & (row < num_steps)
    a = _entry(table, row, 0, COLUMNS, valid)
    b = _entry(table, row, 1, COLUMNS, valid)
    c = _entry(table, row, 2, COLUMNS, valid)
    d = _entry(table, row, 3, COLUMNS, valid)
    e = _entry(table, row, 4, COLUMNS, valid)
    s = _entry(table, row, 6, COLUMNS, valid)
    if x0_prev is not None:
        f = _entry(table, row, 5, COLUMNS, valid)
        if HISTORY > 0:  # the history shifts for any f
            previous = tl.load(x0_prev + here, mask=mask)
        else:
            previous = tl.load(x0_prev + here, mask=element < tl.where(f != 0.0, numel, 0), other=0.0)

    z = tl.zeros((BLOCK,), tl.float32)
    if noise is not None:
        z = tl.load(noise + here, mask=element < tl.where(s != 0.0, numel, 0), other=0.0).to(tl.float32)
    elif keys is not None:  # noqa: SIM102  (the one is known at compile time, the other is not)
        if s != 0.0:
            z = normals(keys + 2 * n, row, STREAM, first, BLOCK)

    clean = tl.fma(b, prediction, a * x_t)
    if threshold is not None:
        bound = tl.load(threshold + n)
        clean = tl.minimum(clean, bound, propagate_nan=tl.PropagateNan.ALL)
        clean = tl.maximum(clean, -bound, propagate_nan=tl.PropagateNan.ALL) / bound
    if clip_range is not None:
        # Keep a NaN of the network.
        clean = tl.minimum(clean, clip_range, propagate_nan=tl.PropagateNan.ALL)
        clean = tl.maximum(clean, -clip_range, propagate_nan=tl.PropagateNan.ALL)
    if x0 is not None:
        tl.store(x0 + here, clean, mask=mask)
    result = tl.fma(e, prediction, tl.fma(d, x_t, c * clean))
    if x0_prev is not None:
        result = tl.fma(f, tl.where(f != 0.0, previous, 0.0) if HISTORY > 0 else previous, result)
        for age in tl.static_range(HISTORY):
            factor = _entry(table, row, 7 + age, COLUMNS, valid)
            place = history + age * batch.to(tl.int64) * numel + here
            older = tl.load(place, mask=mask)
            result = tl.fma(factor, tl.where(factor != 0.0, older, 0.0), result)
            tl.store(place, previous, mask=mask)
            previous = older
    if (noise is not None) or (keys is not None):
        if log_variance is not None:
            log_min = _entry(log_variance, row, 0, 2, valid)
            log_max = _entry(log_variance, row, 1, 2, valid)
            fraction = 0.5 * (v + 1.0)
            z *= tl.exp(0.5 * tl.fma(fraction, log_max, (1.0 - fraction) * log_min))
        result = tl.fma(s, z, result)

    if known is not None:
        signal = _entry(known_table, row, 0, 2, valid)
        sigma = _entry(known_table, row, 1, 2, valid)
        z2 = tl.zeros((BLOCK,), tl.float32)
        if known_noise is not None:
            z2 = tl.load(known_noise + here, mask=element < tl.where(sigma != 0.0, numel, 0), other=0.0).to(tl.float32)
        else:
            if sigma != 0.0:
                z2 = normals(keys + 2 * n, row, KNOWN_STREAM, first, BLOCK)
        at = offsets(n, first, known_sample, known_channel, known_pixel, P, KNOWN_LINEAR, FOURS, BLOCK)
        kept = tl.fma(sigma, z2, signal * tl.load(known + at, mask=mask))
        at = offsets(n, first, mask_sample, mask_channel, mask_pixel, P, MASK_LINEAR, FOURS, BLOCK)
        keep = tl.load(known_mask + at, mask=mask)
        result = tl.fma(keep, kept, (1.0 - keep) * result)

    tl.store(x_next + here, result, mask=mask)
    if net_in is not None:
        at = offsets(n, first, net_sample, net_channel, net_pixel, P, NET_LINEAR, FOURS, BLOCK)
        value = result.to(net_in.dtype.element_ty)
        tl.store(net_in + at, value, mask=mask)
        if guidance_scale is not None:
            at = offsets(n + batch, first, net_sample, net_channel, net_pixel, P, NET_LINEAR, FOURS, BLOCK)
            tl.store(net_in + at, value, mask=mask)


def launch(
    x_next: Tensor,
    x0: Tensor | None,
    net_in: Tensor | None,
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    options: Options,
    history: Tensor | None = None,
) -> None:
    """Write `x_next` and, unless None, `x0` and `net_in`. `x_next` may be `x`, and `x0` may be `x0_prev`.

    Raises:
        ValueError: the pixels of `net_in` have no single stride.
    """
    if x.numel():
        run(make_launch(x_next, x0, net_in, x, out, table, step, options, history=history), x)


def most_block(known: bool, linear: bool) -> int:
    """Return the most elements of a program: with more, known images and a strided network spill."""
    return MOST_BLOCK // 2 if known and not linear else MOST_BLOCK


# Read without strides.
_READ_WHOLE = ("keys", "noise", "x0_prev", "log_variance", "guidance_scale", "known_table", "known_noise", "threshold")


def make_launch(
    x_next: Tensor, x0: Tensor | None, net_in: Tensor | None, x: Tensor, out: Tensor, table: Tensor, step: Tensor,
    o: Options, choice: tuned.Choice | None = None, history: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Return the only launch; `choice` overrides the tables and heuristics.

    Raises:
        ValueError: see `launch`.
    """
    (n, channels), numel = x.shape[:2], x.numel() // x.shape[0]
    out, out_walk = walkable(out)
    net_walk = known_walk = mask_walk = out_walk
    if net_in is not None:
        same, net_walk = walkable(net_in)
        if same is not net_in:
            raise ValueError(f"net_in has strides {net_in.stride()}, must be contiguous or channels-last")
    known, known_mask = o.known, o.known_mask
    if known is not None:
        assert known_mask is not None
        known, known_walk = walkable(known.expand_as(x))
        known_mask, mask_walk = walkable(known_mask.expand_as(x))
    if choice is None:
        shape = (
            n, channels, numel // channels, int(not out_walk.linear),
            1 if o.noise is not None else 0 if o.keys is None else 2, int(o.guidance_scale is not None),
            int(o.log_variance is not None), int(o.x0_prev is not None), int(x0 is not None), int(net_in is not None),
            0 if known is None else 2 if o.known_noise is None else 1,
        )  # fmt: skip
        choice = tuned.choice("reverse_step", x.device, out.dtype, shape)
    most = most_block(known is not None, out_walk.linear and net_walk.linear)
    block, num_warps = block_and_warps(choice, n, numel, x.device, most)
    args: dict[str, Any] = {
        "x_next": x_next, "x0": x0, "net_in": net_in, "x": x, "out": out, "table": table.contiguous(), "step": step,
        "history": history,
    }  # fmt: skip
    args |= {name: _contiguous(getattr(o, name)) for name in _READ_WHOLE}
    args |= {"known": known, "known_mask": known_mask, "clip_range": o.clip_range, "batch": n, "numel": numel,
             "P": numel // channels, "num_steps": table.shape[0], "v_offset": channels * out_walk.channel}  # fmt: skip
    for name, walk in (("out", out_walk), ("net", net_walk), ("known", known_walk), ("mask", mask_walk)):
        args |= {f"{name}_sample": walk.sample, f"{name}_channel": walk.channel, f"{name}_pixel": walk.pixel}
    scale = o.guidance_scale
    constexprs = {
        "OUT_LINEAR": out_walk.linear, "NET_LINEAR": net_walk.linear, "KNOWN_LINEAR": known_walk.linear,
        "MASK_LINEAR": mask_walk.linear, "SCALE_STRIDE": 0 if scale is None or scale.shape[0] == 1 else 1,
        "STREAM": STREAM_STEP, "KNOWN_STREAM": STREAM_KNOWN, "BLOCK": block, "HISTORY": table.shape[1] - 7,
        "FOURS": numel // channels % 4 == 0,
    }  # fmt: skip
    return Launch("reverse_step", _reverse_step, num_programs(n, numel, block), args, constexprs, num_warps)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def aot_variants() -> list[Variant]:
    """Return every dtype of the network's output, every flag alone, and the combinations that samplers use."""
    ancestral = {"philox", "clip", "net_in"}
    cases: list[tuple[str, set[str]]] = [
        ("fp32", ancestral), ("fp16", ancestral), ("bf16", ancestral),
        ("fp32", ancestral | {"channels_last"}), ("fp16", ancestral | {"channels_last"}),
        ("bf16", ancestral | {"channels_last"}),
        ("fp16", {"net_in"}), ("fp16", {"net_in", "clip", "multistep", "x0"}),
        ("fp32", {"noise", "clip", "x0"}), ("fp16", {"noise", "learned", "x0"}),
        ("fp16", ancestral | {"learned", "channels_last"}), ("bf16", ancestral | {"guided"}),
        ("fp16", ancestral | {"guided", "learned", "channels_last"}),
        ("fp32", ancestral | {"known"}), ("fp16", ancestral | {"known", "channels_last"}),
        ("fp16", {"philox", "net_in", "threshold"}), ("fp16", {"net_in", "threshold", "multistep", "x0"}),
        ("fp16", ancestral | {"guided", "learned", "known", "multistep", "x0"}),
        ("fp16", {"net_in", "multistep", "x0", "history"}), ("fp32", ancestral | {"multistep", "x0", "history"}),
    ]  # fmt: skip
    return [_variant(dtype, flags) for dtype, flags in cases] + packaged_variants(("reverse_step",), tuned_variants)


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernels of a tuned choice: x0 clipped to a given bound, and to a bound per sample."""
    return [
        replace(made.variant(f"tuned, {key.dtype}, {key.shape}, {index}"), **aot(made.num_warps))
        for index, (clip_range, threshold) in enumerate(((1.0, False), (None, True)))
        for made in (make_launch(*example(key, clip_range, threshold), choice),)
    ]


def example(key: tuned.Key, clip_range: float | None, threshold: bool) -> tuple[Any, ...]:
    """Return arguments of `make_launch`, on the meta device, laid out as sampling loops have them."""
    n, channels, pixels, last, noise, guided, learned, multistep, x0, net_in, known = key.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def network(channels: int) -> Tensor:
        rows = n * (1 + guided)
        if not last:
            return empty(rows, channels, 1, pixels, dtype=key.dtype)
        # A network of 16 bits reads and writes whole vectors of channels.
        width = -(-channels // 8) * 8 if key.dtype.itemsize == 2 else channels
        return empty(rows, 1, pixels, width, dtype=key.dtype).movedim(-1, 1)[:, :channels]

    x, rows = empty(n, channels, 1, pixels), 1000
    options = Options(
        keys=empty(n, 2, dtype=torch.int64) if noise == 2 or known == 2 else None, noise=x if noise == 1 else None,
        x0_prev=x if multistep else None, clip_range=clip_range, log_variance=empty(rows, 2) if learned else None,
        guidance_scale=empty(1) if guided else None, known=x if known else None,
        known_mask=empty(n, 1, 1, pixels) if known else None, known_table=empty(rows, 2) if known else None,
        known_noise=x if known == 1 else None, threshold=empty(n) if threshold else None,
    )  # fmt: skip
    return (
        x, x if x0 else None, network(channels) if net_in else None, x, network(channels * (1 + learned)),
        empty(rows, 7), empty(1, dtype=torch.int64), options,
    )  # fmt: skip


def _variant(dtype: str, flags: set[str]) -> Variant:
    optional = {
        "x0": ("*fp32", {"x0"}), "net_in": (f"*{dtype}", {"net_in"}), "keys": ("*i64", {"philox"}),
        "noise": ("*fp32", {"noise"}), "x0_prev": ("*fp32", {"multistep"}), "history": ("*fp32", {"history"}),
        "log_variance": ("*fp32", {"learned"}),
        "guidance_scale": ("*fp32", {"guided"}), "known": ("*fp32", {"known"}), "known_mask": ("*fp32", {"known"}),
        "known_table": ("*fp32", {"known"}), "known_noise": ("*fp32", {"known", "noise"}),
        "threshold": ("*fp32", {"threshold"}), "clip_range": ("fp32", {"clip"}),
    }  # fmt: skip
    signature = {"x_next": "*fp32", "x": "*fp32", "out": f"*{dtype}", "table": "*fp32", "step": "*i64"}
    constexprs: dict[str, Any] = {
        "SCALE_STRIDE": 0, "STREAM": STREAM_STEP, "KNOWN_STREAM": STREAM_KNOWN,
        "BLOCK": most_block("known" in flags, "channels_last" not in flags), "FOURS": True,
        "HISTORY": 3 if "history" in flags else 0,
    }  # fmt: skip
    for name, (kind, needed) in optional.items():
        if needed <= flags:
            signature[name] = kind
        else:
            constexprs[name] = None
    divisible = ["numel", "P"]
    signature |= {name: "i32" for name in ("batch", "numel", "P", "num_steps", "v_offset")}
    channels_last = "channels_last" in flags
    # A mask is broadcast over the channels, known images are contiguous.
    walks = {
        "out": Strides(16, 1, 3, False) if channels_last else Strides(16, 16, 1, True),
        "net": Strides(16, 1, 3, False) if channels_last else Strides(16, 16, 1, True),
        "known": Strides(16, 16, 1, True),
        "mask": Strides(16, 0, 1, False),
    }
    for name, walk in walks.items():
        for axis, stride in zip(("sample", "channel", "pixel"), walk[:3], strict=True):
            if stride == 1:
                constexprs[f"{name}_{axis}"] = 1
            else:
                signature[f"{name}_{axis}"] = "i32"
                divisible += [f"{name}_{axis}"] if stride % 16 == 0 else []
        constexprs[f"{name.upper()}_LINEAR"] = walk.linear
    if not channels_last:
        divisible.append("v_offset")
    name = f"reverse_step[{','.join([dtype, *sorted(flags)])}]"
    return Variant(name, _reverse_step, signature, constexprs, divisible=tuple(divisible), **AOT)
