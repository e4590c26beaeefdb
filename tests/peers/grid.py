"""Draw random pipelines of diffusers and compare each with what `accelerate` makes of it, at the same generator.

    python tests/peers/grid.py --count 1400 --output benchmarks/results/grid.json

A case is a pipeline, a scheduler with random fields, a U-Net and the arguments of a call. Outcomes:

    equal           the original's images, and the generator is left where the original leaves it
    equal (loop)    the same, in the pipeline's own loop around our network, or in our loop around its own
    both refuse     the original raises as well
    ours runs       the original raises, we do not
    refused         we raise ValueError or TypeError in one line, the original runs
    wrong           other images
    crash           any other exception of ours
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
from diffusers_objects import CLOSE, quiet, unet

from fastddpm.interop import accelerate

SPACED: dict[str, list[Any]] = {
    "prediction_type": ["epsilon", "epsilon", "sample", "v_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 0, 1],
    "num_train_timesteps": [1000, 1000, 200, 37],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_end": [0.02, 0.02, 0.012, 1e-3, 0.9],
    "trained_betas": [None, None, None, "a list"],
}
ZERO_SNR: dict[str, list[Any]] = {"rescale_betas_zero_snr": [False, False, True]}
CLIPS: dict[str, list[Any]] = {"clip_sample": [True, False], "clip_sample_range": [1.0, 1.0, 2.0]}
THRESHOLD: dict[str, list[Any]] = {"thresholding": [False, False, True], "sample_max_value": [1.0, 1.5]}
SIGMAS: dict[str, list[Any]] = {"sigmas": [None, None, None, "karras", "exponential", "beta"]}
SOLVER: dict[str, list[Any]] = {
    **SPACED,
    **THRESHOLD,
    "sigmas": [None, None, "karras", "exponential", "beta", "flow"],
    "solver_order": [1, 2, 2, 3],
    "lower_order_final": [True, True, False],
}
ENDS: dict[str, list[Any]] = {"final_sigmas_type": ["zero", "zero", "sigma_min"]}
SINGLE = {name: values for name, values in SOLVER.items() if name not in ("timestep_spacing", "steps_offset")}
# Each scheduler with the fields to draw. A field is drawn with a chance of one third, else it is at its default.
SCHEDULERS: dict[str, dict[str, list[Any]]] = {
    "DDPMScheduler": {
        **SPACED, **ZERO_SNR, **CLIPS, **THRESHOLD,
        "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"],
    },
    "DDIMScheduler": {**SPACED, **ZERO_SNR, **CLIPS, **THRESHOLD, "set_alpha_to_one": [True, False]},
    "DDIMInverseScheduler": {**SPACED, **ZERO_SNR, **CLIPS, "set_alpha_to_one": [True, False]},
    "DPMSolverMultistepScheduler": {
        **SOLVER, **ZERO_SNR, **ENDS, "solver_type": ["midpoint", "heun"], "euler_at_final": [False, True],
        "algorithm_type": ["dpmsolver++", "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
        "lambda_min_clipped": [-float("inf"), -5.1], "use_lu_lambdas": [False, False, True],
        "variance_type": [None, None, "learned_range"],
    },
    "DPMSolverSinglestepScheduler": {
        **SINGLE, **ENDS, "solver_type": ["midpoint", "heun"],
        "algorithm_type": ["dpmsolver++", "dpmsolver++", "dpmsolver", "sde-dpmsolver++"],
    },
    "DEISMultistepScheduler": SOLVER,
    "UniPCMultistepScheduler": {
        **SOLVER, **ZERO_SNR, **ENDS, "solver_type": ["bh2", "bh2", "bh1"], "predict_x0": [True, True, False],
        "disable_corrector": [[], [0], [0, 1, 2]],
    },
    "PNDMScheduler": {
        **SPACED, "skip_prk_steps": [True, True, False], "set_alpha_to_one": [False, True],
        "timestep_spacing": ["leading", "leading", "linspace", "trailing"],
    },
    "LCMScheduler": {
        **SPACED, **ZERO_SNR, **CLIPS, **THRESHOLD, "original_inference_steps": [50, 20],
        "timestep_scaling": [10.0, 2.0],
    },
    "EulerDiscreteScheduler": {
        **SPACED, **ZERO_SNR, **SIGMAS, **ENDS, "interpolation_type": ["linear", "log_linear"],
        "timestep_type": ["discrete", "continuous"], "sigma_min": [None, 0.05], "sigma_max": [None, 40.0],
    },
    "EulerAncestralDiscreteScheduler": {**SPACED, **ZERO_SNR},
    "HeunDiscreteScheduler": {**SPACED, **SIGMAS, **CLIPS},
    "KDPM2DiscreteScheduler": {**SPACED, **SIGMAS},
    "KDPM2AncestralDiscreteScheduler": {**SPACED, **SIGMAS},
    "LMSDiscreteScheduler": {**SPACED, **SIGMAS},
    "EDMEulerScheduler": {
        "prediction_type": ["epsilon", "v_prediction"], "sigma_schedule": ["karras", "exponential"],
        "sigma_data": [0.5, 1.0], "sigma_max": [80.0, 10.0], **ENDS,
    },
    # Of these the pipeline keeps its own loop.
    "DDPMParallelScheduler": {**SPACED},
    "TCDScheduler": {**SPACED},
    "SASolverScheduler": {"prediction_type": ["epsilon", "v_prediction"]},
    "DPMSolverMultistepInverseScheduler": {**SPACED},
    "EDMDPMSolverMultistepScheduler": {"prediction_type": ["epsilon", "v_prediction"]},
}  # fmt: skip
UNETS: list[dict[str, Any]] = [
    {},
    {},
    {"in_channels": 1, "out_channels": 1},
    {"sample_size": (8, 4)},
    {"resnet_time_scale_shift": "scale_shift", "center_input_sample": True},
    {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1},
    {"act_fn": "swish", "add_attention": False},
    {"time_embedding_type": "fourier"},
    {"act_fn": "gelu"},
    {"downsample_type": "resnet", "upsample_type": "resnet"},
]
PIPELINES = ("DDPMPipeline", "DDPMPipeline", "DDIMPipeline", "LDMPipeline", "parts", "parts")
STEPS = (1, 2, 3, 5, 7, 9, 12, 16, 20)


def draw_case(rng: random.Random) -> dict[str, Any]:
    """Return a case, of names and numbers alone."""
    pipeline = rng.choice(PIPELINES)
    # A DDIMPipeline makes a DDIMScheduler of whatever it is given.
    name = "DDIMScheduler" if pipeline == "DDIMPipeline" else rng.choice(list(SCHEDULERS))
    fields = {field: rng.choice(values) for field, values in SCHEDULERS[name].items() if rng.random() < 1 / 3}
    if name == "PNDMScheduler" and rng.random() < 0.7:
        fields["skip_prk_steps"] = True
    if fields.get("prediction_type", "epsilon") == "epsilon" and fields.get("sigmas") == "flow":
        fields["prediction_type"] = "flow_prediction"
    call: dict[str, Any] = {"batch_size": rng.choice([1, 2]), "num_inference_steps": rng.choice(STEPS)}
    if pipeline in ("DDIMPipeline", "LDMPipeline") and rng.random() < 0.5:
        call["eta"] = rng.choice([0.3, 1.0])
    if pipeline == "DDIMPipeline" and rng.random() < 0.3:
        call["use_clipped_model_output"] = True
    return {"pipeline": pipeline, "scheduler": name, "fields": fields, "unet": rng.choice(UNETS), "call": call}


def make_scheduler(case: dict[str, Any]) -> Any:
    """Return the scheduler of a case."""
    fields = dict(case["fields"])
    if (sigmas := fields.pop("sigmas", None)) is not None:
        fields[f"use_{sigmas}_sigmas"] = True
    if fields.get("trained_betas") is not None:
        fields |= {"num_train_timesteps": 1000, "trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}
    return getattr(diffusers, case["scheduler"])(**fields)


class Continuous(torch.nn.Module):
    """Stands in for a codebook, in which rounding of the latents may choose another entry."""

    def forward(self, z: Tensor) -> tuple[Tensor, None, None]:
        return z, None, None


def make(case: dict[str, Any]) -> Any:
    """Return the object to accelerate: a pipeline, or a U-Net and a scheduler."""
    scheduler, changes = make_scheduler(case), dict(case["unet"])
    if case["fields"].get("variance_type") == "learned_range":
        changes["out_channels"] = 2 * changes.get("in_channels", 3)
    model = unet(**changes)
    with torch.no_grad():  # variances, or shares between two, that are positive
        model.conv_out.weight *= 0.5
        half = len(model.conv_out.bias) // 2
        if changes.get("out_channels", 3) > changes.get("in_channels", 3):
            model.conv_out.weight[half:] *= 0.01
            model.conv_out.bias[half:] = 0.3
    if case["pipeline"] == "parts":
        return model, scheduler
    if case["pipeline"] == "LDMPipeline":
        torch.manual_seed(1)
        channels = model.config.in_channels
        vqvae = diffusers.VQModel(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, num_vq_embeddings=16
        ).eval()
        vqvae.quantize = Continuous()
        return quiet(diffusers.LDMPipeline(vqvae, model, scheduler))
    return quiet(getattr(diffusers, case["pipeline"])(model, scheduler))


@torch.no_grad()
def original(obj: Any, call: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Return what the original gives: [N, H, W, C]. Of parts, what diffusers' documented loop gives."""
    torch.manual_seed(7)
    if not isinstance(obj, tuple):
        return torch.from_numpy(obj(**call, generator=generator, output_type="np").images)
    import inspect

    from diffusers.utils.torch_utils import randn_tensor

    model, scheduler = obj
    size = model.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    images = randn_tensor((call["batch_size"], model.config.in_channels, *size), generator=generator)
    scheduler.set_timesteps(call["num_inference_steps"])
    images = images * scheduler.init_noise_sigma
    given = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(images, t), t).sample
        images = scheduler.step(out, t, images, **given).prev_sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def ours(obj: Any, call: dict[str, Any], generator: torch.Generator, general: list[str]) -> Tensor:
    """Return what the accelerated object gives; `general` is filled with what was logged."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: general.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fastddpm.interop.diffusers")
    logger.addHandler(handler)
    try:
        fast = quiet(accelerate(obj, noise="torch"))
        torch.manual_seed(7)
        return torch.from_numpy(fast(**call, generator=generator, output_type="np").images)
    finally:
        logger.removeHandler(handler)


def rounded(case: dict[str, Any], seed: int) -> Tensor:
    """Return the original's images, with all noise and what the network says changed in the last bits."""
    bits = torch.Generator().manual_seed(seed)

    def changed(x: Tensor) -> Tensor:
        return x * (1 + 2.0**-22 * torch.empty(x.shape).normal_(generator=bits))

    obj, randn = make(case), torch.randn
    model = obj[0] if isinstance(obj, tuple) else obj.unet
    model.conv_out.register_forward_hook(lambda _, __, out: changed(out))
    with mock.patch("torch.randn", lambda *size, **options: changed(randn(*size, **options))):
        return original(obj, case["call"], torch.Generator().manual_seed(3))


def exact(case: dict[str, Any]) -> Tensor:
    """Return the original's images with its network and states in float64, from the same noise."""
    obj, randn = make(case), torch.randn
    for part in obj if isinstance(obj, tuple) else obj.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    drawn = lambda *size, dtype=None, **options: randn(*size, dtype=torch.float32, **options).double()  # noqa: E731
    with mock.patch("torch.randn", drawn):
        return original(obj, case["call"], torch.Generator().manual_seed(3))


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two sets of images; at least 1 where only one of them has NaN."""
    return float((a - b).nan_to_num().abs().max()) + 1.0 * (not torch.equal(a.isnan(), b.isnan()))


def judge(case: dict[str, Any]) -> tuple[str, str]:
    """Return the outcome of a case and why."""
    try:
        obj = make(case)
    except Exception as error:  # diffusers refuses the fields
        return "no such object", repr(error)[:200]
    theirs_at, ours_at = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected, why = None, ""
    try:
        expected = original(obj, case["call"], theirs_at)
    except Exception as error:
        why = repr(error)[:200]
    general: list[str] = []
    try:
        actual = ours(make(case), case["call"], ours_at, general)
    except Exception as error:
        if expected is None:
            return "both refuse", f"{error!s:.200} | {why}"
        named = isinstance(error, (ValueError, TypeError)) and "\n" not in str(error)
        return ("refused" if named else "crash"), f"{error!r:.300}"
    if expected is None:
        return "ours runs", why
    if expected.shape != actual.shape:
        return "wrong", f"shape {list(actual.shape)}, not {list(expected.shape)}"
    apart = difference(expected, actual)
    if apart > CLOSE:
        rounding = max(difference(rounded(case, seed), expected) for seed in range(3))
        if apart > max(10 * rounding, CLOSE):
            # The noise of `rounded` enters the network only. In long steps a scheduler's own arithmetic may round more.
            truth = exact(case)
            theirs_error, ours_error = difference(expected, truth), difference(actual, truth)
            if ours_error > max(CLOSE, 2 * theirs_error):
                errors = f"from float64: theirs {theirs_error:.2e}, ours {ours_error:.2e}"
                return "wrong", f"apart by {apart:.2e}, rounding {rounding:.2e}, {errors}"
    if not torch.equal(theirs_at.get_state(), ours_at.get_state()):
        return "wrong", "the generator is left elsewhere"
    return ("equal (loop)", general[0][:200]) if general else ("equal", "")


def run(
    count: int, seed: int, *, before: dict[str, Any] | None = None, output: Path | None = None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return how often each outcome came, and the cases to look at. What diffusers does not make is drawn again.

    Args:
        count, seed: of the cases.
        before: the result of the first cases, which are drawn again but not judged.
        output: where to write the result every 25 cases.
    """
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    before = before or {"count": 0, "outcomes": {}, "cases": []}
    rng, counts, cases = random.Random(seed), collections.Counter[str](before["outcomes"]), list(before["cases"])
    done = 0
    while done < count:
        case = draw_case(rng)
        if done < before["count"]:
            done += judgeable(case)
            continue
        outcome, why = judge(case)
        if outcome == "no such object":
            continue
        done += 1
        counts[outcome] += 1
        if outcome in ("wrong", "crash", "refused"):
            cases.append({"outcome": outcome, "why": why, **case})
            if output:
                print(outcome, "|", why, "|", json.dumps(case)[:400], flush=True)
        if output and (done % 25 == 0 or done == count):
            print(done, dict(counts), flush=True)
            versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
            result = {"count": done, "seed": seed, "outcomes": dict(sorted(counts.items())), "cases": cases}
            output.write_text(json.dumps({**result, "versions": versions}, indent=1) + "\n", encoding="utf-8")
    return dict(sorted(counts.items())), cases


def judgeable(case: dict[str, Any]) -> bool:
    """Return whether diffusers makes the objects of a case."""
    try:
        make(case)
    except Exception:
        return False
    return True


def main() -> None:
    """Run the grid and write its counts. A file that was begun with the same seed is gone on with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the counts and what is not equal")
    options = parser.parse_args()
    before = None
    if options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
        before = found if found["seed"] == options.seed and found["count"] < options.count else None
    counts, _ = run(options.count, options.seed, before=before, output=options.output)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
