"""diffusers' DDPMPipeline before and after `accelerate`: seconds, and how far the images are from each other.

python examples/accelerate_diffusers.py google/ddpm-cifar10-32     (without a name: a small model of random weights)
"""

import argparse
import time

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fastddpm.interop import accelerate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="a pipeline folder, or its name on the Hub")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()
unet = None if args.model else UNet2DModel(32, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
pipe = DDPMPipeline.from_pretrained(args.model) if args.model else DDPMPipeline(unet, DDPMScheduler())
pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
images = []
for name, pipeline in {"before": pipe, "after": accelerate(pipe)}.items():
    pipeline(args.batch_size, num_inference_steps=args.steps)  # the first call captures graphs
    start = time.perf_counter()
    images.append(pipeline(args.batch_size, torch.manual_seed(0), args.steps, "pt").images.cpu())
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference: {(images[0] - images[1]).abs().max():.1e}")
