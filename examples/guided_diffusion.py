"""A guided-diffusion checkpoint, its U-Net called as it is and prepared by `load_sampler`: seconds, and the difference.

python examples/guided_diffusion.py 64x64_diffusion.pt image_size=64 ... --steps 250     (without: random weights)
"""

import argparse
import time

import torch

from fastddpm import Sampler
from fastddpm.interop.guided_diffusion import load_sampler, shapes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="of a model with learn_sigma and class_cond")
parser.add_argument("flags", nargs="*", help="of the model, as name=value")
parser.add_argument("--steps", default="25", help="timestep_respacing")
args = parser.parse_intermixed_args()

given = dict(flag.split("=") for flag in args.flags)
flags = given or {"image_size": 32, "num_channels": 32, "channel_mult": "1,2,2", "resblock_updown": True}
flags |= {"learn_sigma": True, "class_cond": True}
weights = args.checkpoint or {name: torch.randn(shape) / 30 for name, shape in shapes(**flags).items()}

prepared = load_sampler(weights, args.steps, device="cuda" if torch.cuda.is_available() else "cpu", **flags)
plain = Sampler(
    lambda x, t, y: prepared.model(x, t, y),  # a function: nothing is known of it, so nothing is prepared
    prepared.schedule,
    timesteps=prepared.timesteps,
    variance_type="learned_range",
    convention="guided_diffusion",
    device=prepared.device,
    cuda_graph=False,
)


def draw(sampler: Sampler) -> torch.Tensor:
    size = prepared.config.sample_size
    return sampler.sample(4, seed=0, class_labels=7, shape=(3, size, size)).cpu()


results = []
for name, sampler in (("before", plain), ("after", prepared)):
    draw(sampler)  # the first call builds kernels and captures graphs
    start = time.perf_counter()
    results.append(draw(sampler))
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference, of [-1, 1]: {(results[0] - results[1]).abs().max():.1e}")
