"""Find the arguments of denoising_diffusion_pytorch's `Unet` from the names and shapes of its weights.

The weights do not show `sinusoidal_pos_emb_theta`, nor `dropout` and `flash_attn`, which do not affect sampling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def unet_arguments(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Return the arguments of the `Unet` that has a state dict of these names and shapes.

    Args:
        state: of the network alone, without the prefix that its names have within a diffusion.
        where: the beginning of messages.

    Raises:
        ValueError: it belongs to another network; the message says which part differs.
    """
    for name in ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight"):
        if name not in state:
            raise ValueError(f"{where} has no {name}, must be of a Unet of denoising_diffusion_pytorch 2.0 or newer")
    first, last, time = state["init_conv.weight"], state["final_conv.weight"], state["time_mlp.1.weight"]
    for name, tensor in state.items():
        if not tensor.dtype.is_floating_point or 0 in tensor.shape:
            raise ValueError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, must be floating-point numbers")
    if time.ndim != 2 or time.shape[0] < 4 or last.ndim != 4:
        shapes = f"time_mlp.1.weight {list(time.shape)}, final_conv.weight {list(last.shape)}"
        raise ValueError(f"{where} has {shapes}, must have two and four dimensions")
    if first.ndim != 4:
        raise ValueError(
            f"{where} is of a network for sequences (init_conv.weight has shape {list(first.shape)}), must be of a "
            "Unet for images; load_trainer_checkpoint(path, diffusion) loads it into a GaussianDiffusion1D"
        )
    if "time_mlp.0.weights" in state:
        raise ValueError(
            f"{where} has time_mlp.0.weights, a learned or random time embedding, which GaussianDiffusion does not take"
        )
    dim, channels = time.shape[0] // 4, last.shape[0]
    if first.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"{where}: init_conv.weight reads {first.shape[1]} channels and final_conv.weight gives {channels}, must "
            "be as many, or twice as many with self-conditioning"
        )
    stages = len({match[0] for name in state if (match := re.match(r"downs\.\d+\.", name))})
    widths, heads, dims, full = [], [], [], []
    for stage in range(stages):
        names = (f"downs.{stage}.3.1.weight", f"downs.{stage}.3.weight")  # with a rearrangement before, and without
        convolution = next((state[name] for name in names if name in state), None)
        kept = state.get(f"downs.{stage}.2.mem_kv")  # keys and values that attention always sees
        if convolution is None or kept is None or kept.ndim != 4 or not convolution.ndim:
            raise ValueError(
                f"{where} has no {names[0]} or no downs.{stage}.2.mem_kv, must be of a Unet of "
                "denoising_diffusion_pytorch 2.0 or newer"
            )
        widths.append(convolution.shape[0])
        full.append(f"downs.{stage}.2.to_out.weight" in state)  # linear attention ends in a norm
        heads.append(kept.shape[1])
        dims.append(kept.shape[3 if full[-1] else 2])
    if not stages or any(width % dim for width in widths):
        raise ValueError(f"{where}: widths {widths} are no multiples of dim, {dim} (a quarter of time_mlp.1.weight)")
    return {
        "dim": dim,
        "init_dim": first.shape[0],
        "dim_mults": tuple(width // dim for width in widths),
        "channels": channels,
        "self_condition": first.shape[1] == 2 * channels,
        "full_attn": tuple(full),
        "attn_heads": tuple(heads),
        "attn_dim_head": tuple(dims),
    }
