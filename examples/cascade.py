"""Two checkpoints of guided-diffusion, one after the other: small images of a class, then each enlarged.

python examples/cascade.py 64x64_diffusion.pt 64_256_upsampler.pt --label 207 --steps 250      (without: random weights)
"""

import argparse
import time

import torch

from fastddpm.common.images import save_grid
from fastddpm.interop.guided_diffusion import load_sampler, shapes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base", nargs="?", help="the published 64x64 model")
parser.add_argument("upsampler", nargs="?", help="the published 64 to 256 upsampler")
parser.add_argument("--label", type=int, default=207)
parser.add_argument("--steps", default="25", help="timestep_respacing of both")
parser.add_argument("--count", type=int, default=4)
parser.add_argument("--output", default="cascade.png")
args = parser.parse_args()

common = {"class_cond": True, "learn_sigma": True, "resblock_updown": True}
if args.upsampler:
    common |= {"num_channels": 192, "attention_resolutions": "32,16,8"}
    base = {"image_size": 64, "num_head_channels": 64, "num_res_blocks": 3, "use_new_attention_order": True}
    base |= {"noise_schedule": "cosine", "dropout": 0.1}
    upsampler = {"large_size": 256, "small_size": 64, "num_heads": 4}
else:
    common |= {"num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1}
    base, upsampler = {"image_size": 8}, {"large_size": 32, "small_size": 8}
device = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str | None, flags: dict[str, object]) -> object:
    weights = path or {name: torch.randn(shape) / 30 for name, shape in shapes(**flags).items()}
    return load_sampler(weights, args.steps, device=device, **flags)


first, second = load(args.base, common | base), load(args.upsampler, common | upsampler)
start = time.perf_counter()
small = first.sample(args.count, seed=0, class_labels=args.label)
large = second.sample(args.count, seed=1, class_labels=args.label, low_res=small)
shapes_of = " and ".join(str(list(images.shape)) for images in (small, large))
print(f"{shapes_of} in {time.perf_counter() - start:.1f} s")
save_grid(args.output, large)
print(f"wrote {args.output}")
