"""Compute the noising step in one kernel: read x_0 once, make the noise in registers, write x_t and the target.

Pointers that are None switch their part off at compile time: `noise` or `keys`, `target`.
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
from fastddpm_kernels.philox import STREAM_Q_SAMPLE
from fastddpm_kernels.philox.triton import normals


@triton.jit
def _q_sample(
    x_t, target, x0, table, t, noise, keys, step,
    numel, P, num_rows,
    x0_sample, x0_channel, x0_pixel, y_sample, y_channel, y_pixel, noise_sample, noise_channel, noise_pixel,
    X0_LINEAR: tl.constexpr, Y_LINEAR: tl.constexpr, NOISE_LINEAR: tl.constexpr, FOURS: tl.constexpr,
    STREAM: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(numel, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    mask = elements(first, BLOCK) < numel
    at = offsets(n, first, x0_sample, x0_channel, x0_pixel, P, X0_LINEAR, FOURS, BLOCK)
    x = tl.load(x0 + at, mask=mask).to(tl.float32)
    if noise is not None:
        at = offsets(n, first, noise_sample, noise_channel, noise_pixel, P, NOISE_LINEAR, FOURS, BLOCK)
        z = tl.load(noise + at, mask=mask).to(tl.float32)
    else:
        training_step = tl.full((), 0, tl.int64)
        if step is not None:
            training_step = tl.load(step)
        z = normals(keys + 2 * n, training_step, STREAM, first, BLOCK)

    row = tl.load(t + n)
    valid = (row >= 0) & (row < num_rows)
    signal = tl.load(table + 2 * row, mask=valid, other=float("nan"))
    sigma = tl.load(table + 2 * row + 1, mask=valid, other=float("nan"))
    at = offsets(n, first, y_sample, y_channel, y_pixel, P, Y_LINEAR, FOURS, BLOCK)
    tl.store(x_t + at, tl.fma(sigma, z, signal * x).to(x_t.dtype.element_ty), mask=mask)
    if target is not None:
        value = z
        if V:
            value = tl.fma(-sigma, x, signal * z)
        tl.store(target + at, value.to(target.dtype.element_ty), mask=mask)


def most_block(itemsize: int) -> int:
    """Return the most elements of a program: in 16 bits the kernel is bound by instructions with fewer."""
    return 2 * MOST_BLOCK if itemsize == 2 else MOST_BLOCK


def launch(
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    step: Tensor | None,
    prediction_type: str,
    x_t: Tensor,
    target: Tensor | None,
) -> None:
    """Write `x_t` and, unless None, `target`, both of one memory format; `x0` and `noise` may have any."""
    if x_t.numel():
        run(make_launch(x0, table, t, noise, keys, step, prediction_type, x_t, target), x_t)


def make_launch(
    x0: Tensor, table: Tensor, t: Tensor, noise: Tensor | None, keys: Tensor | None, step: Tensor | None,
    prediction_type: str, x_t: Tensor, target: Tensor | None, choice: tuned.Choice | None = None,
) -> Launch:  # fmt: skip
    """Return the only launch; `choice` overrides the tables and heuristics."""
    numel = x_t.numel() // x_t.shape[0]
    x0, x0_walk = walkable(x0)
    x_t, y_walk = walkable(x_t)
    source = 2 if noise is None else 1
    noise, noise_walk = (None, x0_walk) if noise is None else walkable(noise)
    pixels, velocity = numel // x_t.shape[1], prediction_type == "v_prediction"
    if choice is None:
        written = 0 if target is None else 2 if velocity else 1
        shape = (x_t.shape[0], x_t.shape[1], pixels, int(not y_walk.linear), source, written)
        choice = tuned.choice("q_sample", x_t.device, x_t.dtype, shape)
    block, num_warps = block_and_warps(choice, len(x_t), numel, x_t.device, most_block(x_t.itemsize))
    args: dict[str, Any] = {
        "x_t": x_t, "target": target, "x0": x0, "table": table.contiguous(), "t": t.contiguous(), "noise": noise,
        "keys": None if keys is None else keys.contiguous(), "step": step, "numel": numel, "P": pixels,
        "num_rows": table.shape[0],
    }  # fmt: skip
    for name, walk in (("x0", x0_walk), ("y", y_walk), ("noise", noise_walk)):
        args |= {f"{name}_sample": walk.sample, f"{name}_channel": walk.channel, f"{name}_pixel": walk.pixel}
    constexprs = {"X0_LINEAR": x0_walk.linear, "Y_LINEAR": y_walk.linear, "NOISE_LINEAR": noise_walk.linear,
                  "FOURS": pixels % 4 == 0,
                  "STREAM": STREAM_Q_SAMPLE, "V": velocity, "BLOCK": block}  # fmt: skip
    programs = num_programs(x_t.shape[0], numel, block)
    return Launch("q_sample", _q_sample, programs, args, constexprs, num_warps)


def aot_variants() -> list[Variant]:
    """Return every dtype with its own noise, the three targets, given noise, and channels-last."""
    cases: list[tuple[str, dict[str, bool]]] = [
        ("fp32", {}), ("fp16", {}), ("bf16", {}),
        ("fp32", {"v": True}), ("fp16", {"v": True}), ("bf16", {"v": True}),
        ("fp32", {"given": True}), ("fp16", {"given": True, "v": True}),
        ("fp16", {"target": False}),
        ("fp32", {"channels_last": True}), ("bf16", {"channels_last": True, "v": True}),
        ("fp16", {"channels_last": True, "given": True}),
    ]  # fmt: skip
    return [_variant(dtype, **flags) for dtype, flags in cases] + packaged_variants(("q_sample",), tuned_variants)


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernel of a tuned choice, with a training step to read."""
    n, channels, pixels, last, source, written = key.shape
    given = source == 1

    def image() -> Tensor:
        shape = (n, 1, pixels, channels) if last else (n, channels, 1, pixels)
        return torch.empty(shape, dtype=key.dtype, device="meta").movedim(-1 if last else 1, 1)

    table, t, keys, step = (
        torch.empty(1000, 2, device="meta"),
        *(torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((n,), (n, 2), (1,))),
    )
    made = make_launch(
        image(), table, t, image() if given else None, None if given else keys, None if given else step,
        "v_prediction" if written == 2 else "epsilon", image(), image() if written else None, choice,
    )  # fmt: skip
    return [replace(made.variant(f"tuned, {key.dtype}, {key.shape}"), **aot(made.num_warps))]


def _variant(
    dtype: str, v: bool = False, given: bool = False, target: bool = True, channels_last: bool = False
) -> Variant:
    flags = [name for name, on in (("v", v), ("given", given), ("channels_last", channels_last)) if on]
    pointer = f"*{dtype}"
    signature = {"x_t": pointer, "x0": pointer, "table": "*fp32", "t": "*i64"}
    constexprs: dict[str, Any] = {"STREAM": STREAM_Q_SAMPLE, "V": v, "FOURS": True}
    constexprs["BLOCK"] = most_block(4 if dtype == "fp32" else 2)
    # The target of "epsilon" is the given noise itself, so nothing is written.
    if target and (v or not given):
        signature["target"] = pointer
    else:
        constexprs["target"] = None
        flags += [] if target else ["no_target"]
    if given:
        signature["noise"] = pointer
        constexprs |= {"keys": None, "step": None}
    else:
        signature |= {"keys": "*i64", "step": "*i64"}
        constexprs["noise"] = None
    signature |= {"numel": "i32", "P": "i32", "num_rows": "i32"}
    divisible = ["numel", "P"]
    for name in ("x0", "y", "noise"):
        signature[f"{name}_sample"] = "i32"
        divisible.append(f"{name}_sample")
        if channels_last:
            constexprs[f"{name}_channel"] = 1
            signature[f"{name}_pixel"] = "i32"
        else:
            signature[f"{name}_channel"] = "i32"
            constexprs[f"{name}_pixel"] = 1
        constexprs[f"{name.upper()}_LINEAR"] = not channels_last
    name = f"q_sample[{','.join([dtype, *flags])}]"
    return Variant(name, _q_sample, signature, constexprs, divisible=tuple(divisible), **AOT)
