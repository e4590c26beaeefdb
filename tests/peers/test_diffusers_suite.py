"""The counts of diffusers' own tests against accelerated objects, which `diffusers_suite.py` runs from a checkout.

The installed package brings no tests. Those that this suite restates, with their published numbers and tolerances:
`tests/interop/test_diffusers_published.py` has the slices of tests/pipelines/{ddpm,ddim,latent_diffusion} and the whole
loops of tests/schedulers/test_scheduler_{ddpm,ddim,dpm_multi,dpm_single,unipc,deis,lcm}.py. Upstream's loops of
schedulers in sigma scale the sample in place, which no pipeline does; `diffusers_suite.py` runs those.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_passes_passes_accelerated_too() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "diffusers_suite.json").read_text(encoding="utf-8"))
    assert kept["passes only as it is"] == {}
    assert kept["totals"]["accelerated"]["passed"] >= kept["totals"]["as they are"]["passed"] > 500
    assert kept["totals"]["accelerated"]["uses"] > 100
    for kind in ("pipeline", "U-Net", "U-Net, frozen", "scheduler"):
        assert kept["calls"][kind] > 0
