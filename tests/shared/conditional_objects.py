"""Small text-to-image pipelines of diffusers, seeded, without text encoders: prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

# Of the largest latent: both loops compute in float32, with equivalent formulas in another order.
CLOSE = 1e-4
LEVELS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH, TOKENS = 8, 7
# The U-Net of Stable Diffusion, of SDXL, and of DeepFloyd IF, as small as their blocks allow.
SD: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}
XL: dict[str, Any] = {
    **SD,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + WIDTH,
    "use_linear_projection": True,
}
IF: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "encoder_hid_dim": WIDTH,
    "cross_attention_dim": 32,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
    "attention_head_dim": 4,
}
# Not IF's own cosine schedule, but little noise: there x0 is 400 times the prediction, and so is its rounding.
IF_LEVELS: dict[str, Any] = {"beta_end": 2e-3, "variance_type": "learned_range"}


def unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**(config or SD)).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip


def scheduler(name: str = "DDIM", **settings: Any) -> Any:
    """A scheduler with Stable Diffusion's levels and settings."""
    own: dict[str, Any] = {**LEVELS, "steps_offset": 1}
    own |= {"DDIM": {"clip_sample": False, "set_alpha_to_one": False}, "PNDM": {"skip_prk_steps": True}}.get(name, {})
    own |= {"DDPM": {"clip_sample": False}, "LCM": {"original_inference_steps": 50}}.get(name, {})
    return getattr(diffusers, f"{name}Scheduler")(**{**own, **settings})


def pipeline(name: str = "StableDiffusionPipeline", config: dict[str, Any] | None = None, **parts: Any) -> Any:
    """A pipeline around a U-Net of `config`; what is not given or needed is None."""
    kind = getattr(diffusers, name)
    xl, pixels = "XL" in name, name.startswith("IF")
    given = {"unet": unet(**(config or (XL if xl else IF if pixels else SD))), "scheduler": scheduler(), **parts}
    if not pixels:
        given["vae"] = vae()
    signature, _ = kind._get_signature_keys(kind)
    given |= dict.fromkeys(signature - given.keys())
    if not xl:
        given["requires_safety_checker"] = False
    if "UpscalePipeline" in name:
        del given["requires_safety_checker"]
    result = kind(**given)
    result.set_progress_bar_config(disable=True)
    return result


def prompts(count: int = 2, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(count, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def text(pixels: bool = False, xl: bool = False) -> dict[str, Any]:
    """The arguments of a call: embeddings of two prompts and of two negative ones, few steps."""
    given: dict[str, Any] = {"prompt_embeds": prompts(), "negative_prompt_embeds": prompts(seed=2)}
    if xl:
        given |= {"pooled_prompt_embeds": prompts()[:, 0], "negative_pooled_prompt_embeds": prompts(seed=2)[:, 0]}
    return {**given, "num_inference_steps": 6, "output_type": "pt" if pixels else "latent"}


def draw(pipe: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What a call draws with a generator of seed 0, and the state that it leaves the generator in."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(generator=generator, **arguments).images
    return torch.as_tensor(images), generator.get_state()


def apart(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert expected.shape == actual.shape
    assert bool(expected.isfinite().all())
    return float((expected - actual).abs().max() / expected.abs().max())
