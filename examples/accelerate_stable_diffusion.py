"""Stable Diffusion before and after `accelerate`: seconds, and how far the latents are from each other.

python examples/accelerate_stable_diffusion.py stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red boat"
python examples/accelerate_stable_diffusion.py --full     (SD 1.5's U-Net of random weights; without: a tiny one)
"""

import argparse
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from fastddpm import accelerate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="a pipeline folder, or its name on the Hub")
parser.add_argument("--prompt", default="a lighthouse in a storm")
parser.add_argument("--full", action="store_true")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

if args.model:
    original, text = DiffusionPipeline.from_pretrained(args.model), {"prompt": args.prompt}
else:
    tiny = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "sample_size": 16, "layers_per_block": 1}
    unet = UNet2DConditionModel(cross_attention_dim=768, **({"sample_size": 64} if args.full else tiny)).eval()
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    original = StableDiffusionPipeline(
        vae=AutoencoderKL(), unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
    )
    text = {"prompt_embeds": torch.randn(1, 77, 768), "negative_prompt_embeds": torch.randn(1, 77, 768)}
original.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)

accelerated = accelerate(original)  # this is all

results = []
for name, pipeline in (("before", original), ("after", accelerated)):
    pipeline(**text, num_inference_steps=2, output_type="latent")  # the first call prepares the U-Net
    start, generator = time.perf_counter(), torch.manual_seed(0)  # the same random numbers for both
    results.append(pipeline(**text, num_inference_steps=args.steps, generator=generator, output_type="latent").images)
    print(f"{name}: {time.perf_counter() - start:.3f} s")
difference = (results[0] - results[1]).abs().max() / results[0].abs().max()
print(f"largest difference, of the largest latent: {difference:.1e}")
