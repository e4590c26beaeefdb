"""Prepare a U-Net for sampling: compute everything that does not depend on the state before the first step.

- The time embedding and the projections of all blocks become one table, a row per step (`time_table`).
- What depends on a call's conditions alone is computed once per call (`Builder.once`, `Embeddings.of_conditions`).
- Weights are folded, exactly, and stored once in the compute dtype, channels-last (`folding`).
- The forward becomes a list of instructions over numbered slots of one block of memory (`lowering`, `instructions`,
  `program`). Norms and 1x1 convolutions add the residuals and biases that they read, and skip connections are read in
  place.

The code for one kind of U-Net is in its folder in `kinds`; no other code here depends on a library.

The folds are exact algebra: in float64 the result differs from the U-Net's by rounding only. The next `load` takes over
weights that have changed, and refuses a U-Net whose layers have changed or got hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastddpm.networks.frozen.frozen_unet import FrozenUNet, why_not
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.networks.frozen.kinds import blueprint_of
from fastddpm.networks.frozen.program import Program

__all__ = ["FrozenUNet", "Program", "blueprint_of", "cuda_instructions", "freeze", "why_not"]


def freeze(
    unet: nn.Module,
    timesteps: Tensor | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    backend: str = "auto",
    allow_tf32: bool = False,
    weight_dtype: torch.dtype | None = None,
    fusion: str = "auto",
) -> FrozenUNet:
    """Prepare a U-Net for sampling at given timesteps. The U-Net itself does not change.

    Args:
        unet: a `fastddpm.UNet`, or a `Unet` of denoising_diffusion_pytorch. For the latter, `FrozenUNet.differs`
            tells whether its forward is the one that was frozen. In eval mode or not: dropout does nothing here.
        timesteps: int64 [S], one for every step of the loop; the default of `FrozenUNet.bind`.
        dtype: of the computation: float16, bfloat16, float32 or float64; None for the U-Net's.
        device: None for the U-Net's.
        backend: of the fused kernels: "auto", "triton", "eager" or "reference".
        allow_tf32: let tensor cores round float32 factors to TF32.
        weight_dtype: torch.float16 stores the weights of convolutions in it, for native kernels in float32.
        fusion: how layers are divided into kernels on CUDA. "full": a convolution takes in the norm before it and all
            that is added after it, and an attention block of one head is one kernel. "parts": the vendor's
            convolutions, with norms between them. "auto": what is faster for each layer, as measured on the device
            (`fastddpm tune`); "parts" for what is not measured.

    Raises:
        ValueError: the U-Net is of no known kind, has other layers or hooks, a device has no float64, or weights
            cannot be stored so.
        BackendError: the named backend cannot run on the device.
    """
    frozen = FrozenUNet(
        unet, dtype, device, backend=backend, allow_tf32=allow_tf32, weight_dtype=weight_dtype, fusion=fusion
    )
    frozen.timesteps = torch.as_tensor(timesteps, dtype=torch.int64, device=frozen.device)
    return frozen


def cuda_instructions(
    unet: nn.Module, batch: int = 1, size: tuple[int, int] | None = None, dtype: torch.dtype = torch.float16, *,
    fusion: str = "auto", allow_tf32: bool = False,
) -> list[Instruction]:  # fmt: skip
    """Return the instructions that one step of the frozen U-Net runs on a CUDA GPU. No GPU is needed.

    Args:
        batch: N. With more samples, the norms need fewer splits to fill the GPU.
        size: (height, width) of the images; None for the config's.
        dtype: of the computation.
        allow_tf32: see `freeze`.
        fusion: see `freeze`; without a GPU there is no tuned table, so that "auto" is "parts".

    Returns:
        The instructions, in order; the sum of their `kernels` is the number of kernels launched. Libraries may launch
        more inside a convolution; only a run shows these.
    """
    frozen = FrozenUNet(copy.deepcopy(unet).to("meta"), dtype, "meta", fusion=fusion, allow_tf32=allow_tf32)
    blueprint = frozen.blueprint
    inputs = frozen.new_input((batch, blueprint.in_channels, *(size or blueprint.sample_size)))
    timesteps = torch.empty(1000, dtype=torch.int64, device="meta")
    conditions = blueprint.some_conditions(batch, "meta")
    return frozen.bind(inputs, timesteps, blueprint.some_labels(batch, "meta"), conditions).instructions
