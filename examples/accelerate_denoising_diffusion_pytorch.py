"""denoising_diffusion_pytorch's GaussianDiffusion before and after `accelerate`: seconds, how far the images differ.

python examples/accelerate_denoising_diffusion_pytorch.py results/model-10.pt     (without: small, random weights)
"""

import argparse
import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

from fastddpm.interop.lucidrains import accelerate, load_trainer_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="a file of Trainer, of a Unet of --dim and images of --image-size")
parser.add_argument("--dim", type=int, default=16)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--steps", type=int, help="of DDIM; all timesteps of DDPM without")
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()
diffusion = GaussianDiffusion(Unet(args.dim), image_size=args.image_size, sampling_timesteps=args.steps).eval()
diffusion = load_trainer_checkpoint(args.checkpoint, diffusion) if args.checkpoint else diffusion
diffusion.to("cuda" if torch.cuda.is_available() else "cpu")
images = []
for name, sampled in {"before": diffusion, "after": accelerate(diffusion, noise="torch")}.items():
    sampled.sample(args.batch_size)  # the first call captures graphs
    start = (torch.manual_seed(0), time.perf_counter())[1]
    images.append(sampled.sample(args.batch_size).cpu())
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference: {(images[0] - images[1]).abs().max():.1e}")
