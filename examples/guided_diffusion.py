"""A guided-diffusion checkpoint, its U-Net called as it is and prepared by `load_sampler`: seconds, and the difference.

python examples/guided_diffusion.py 64x64_diffusion.pt image_size=64 ... --steps 250     (without: random weights)
"""

import argparse
import time

import torch

from fastddpm import Sampler
from fastddpm.interop import guided_diffusion as openai

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", nargs="?", help="of a model with learn_sigma and class_cond")
parser.add_argument("flags", nargs="*", help="of the model, as name=value")
parser.add_argument("--steps", default="25", help="timestep_respacing")
args = parser.parse_intermixed_args()
flags = {"image_size": 32, "num_channels": 32, "channel_mult": "1,2,2", "resblock_updown": True}
flags = (dict(flag.split("=") for flag in args.flags) or flags) | {"learn_sigma": True, "class_cond": True}
state = args.checkpoint or {name: torch.randn(shape) / 30 for name, shape in openai.shapes(**flags).items()}
after = openai.load_sampler(state, args.steps, device="cuda" if torch.cuda.is_available() else "cpu", **flags)
before = Sampler(lambda x, t, y: after.model(x, t, y), after.schedule, timesteps=after.timesteps, device=after.device,
    variance_type="learned_range", convention="guided_diffusion", cuda_graph=False)  # fmt: skip
images, arguments = [], {"class_labels": 7, "shape": (3, *[after.config.sample_size] * 2)}
for name, sampler in {"before": before, "after": after}.items():
    start = (sampler.sample(4, **arguments), time.perf_counter())[1]  # the first call captures graphs
    images += [sampler.sample(4, **arguments).cpu()]
    print(f"{name}: {time.perf_counter() - start:.3f} s")
print(f"largest difference: {(images[0] - images[1]).abs().max():.1e}")
