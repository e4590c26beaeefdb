"""diffusers' DDPMPipeline before and after `accelerate`: seconds, and how far the images are from each other.

python examples/accelerate_diffusers.py google/ddpm-cifar10-32     (without a name: a small model of random weights)
"""

import argparse
import time

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fastddpm import accelerate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="a pipeline folder, or its name on the Hub")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()

if args.model:
    original = DDPMPipeline.from_pretrained(args.model)
else:
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    original = DDPMPipeline(unet, DDPMScheduler())
original.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)

accelerated = accelerate(original)  # this is all


def draw(pipeline: DDPMPipeline) -> torch.Tensor:
    generator = torch.manual_seed(0)  # the same random numbers for both
    images = pipeline(args.batch_size, generator, num_inference_steps=args.steps, output_type="pt").images
    return images.cpu()


results = []
for name, pipeline in (("before", original), ("after", accelerated)):
    draw(pipeline)  # the first call builds kernels and captures graphs
    start = time.perf_counter()
    results.append(draw(pipeline))
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference, of [0, 1]: {(results[0] - results[1]).abs().max():.1e}")
