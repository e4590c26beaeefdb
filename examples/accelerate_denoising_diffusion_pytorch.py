"""denoising_diffusion_pytorch's GaussianDiffusion before and after `accelerate`: seconds, how far the images differ.

python examples/accelerate_denoising_diffusion_pytorch.py results/model-10.pt     (without: small, random weights)
"""

import argparse
import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

from fastddpm import accelerate
from fastddpm.interop.lucidrains import load_trainer_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="a file of Trainer, of a Unet of --dim and images of --image-size")
parser.add_argument("--dim", type=int, default=16)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--steps", type=int, help="of DDIM; all timesteps of DDPM without")
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()

original = GaussianDiffusion(Unet(args.dim), image_size=args.image_size, sampling_timesteps=args.steps).eval()
if args.checkpoint:
    original = load_trainer_checkpoint(args.checkpoint, original)
original.to("cuda" if torch.cuda.is_available() else "cpu")

accelerated = accelerate(original, noise="torch")  # this is all; without noise= it draws Philox's noise


def draw(diffusion: GaussianDiffusion) -> torch.Tensor:
    torch.manual_seed(0)  # the same random numbers for both
    return diffusion.sample(args.batch_size).cpu()


results = []
for name, diffusion in (("before", original), ("after", accelerated)):
    draw(diffusion)  # the first call builds kernels and captures graphs
    start = time.perf_counter()
    results.append(draw(diffusion))
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference, of [0, 1]: {(results[0] - results[1]).abs().max():.1e}")
