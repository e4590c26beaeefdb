"""Random configurations of denoising_diffusion_pytorch's diffusions, accelerated and beside the original.

    python tests/peers/lucidrains_grid.py --count 400 --output benchmarks/results/grid_lucidrains.json

Every configuration is drawn from its own seed: class, objective, schedule, steps, network, options and the call. The
verdict is "equal", "different", "crash", "refused" (an error of one line that names a field), or "original fails".
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import denoising_diffusion_pytorch as library
import torch
from denoising_diffusion_pytorch import classifier_free_guidance, guided_diffusion, repaint, simple_diffusion
from torch import Tensor, nn

from fastddpm import accelerate

_PERTURBATION = 1e-6  # of the rms of every prediction of the original: float32 rounds a U-Net's by about this
_KINDS = (
    *("GaussianDiffusion", "GaussianDiffusion1D", "classifier_free_guidance", "guided_diffusion", "repaint"),
    *("LearnedGaussianDiffusion", "WeightedObjectiveGaussianDiffusion", "simple_diffusion", "ElucidatedDiffusion"),
    *("ContinuousTimeGaussianDiffusion", "VParamContinuousTimeGaussianDiffusion", "subclass"),
)
_WITHOUT_SIGMOID = ("GaussianDiffusion1D", "classifier_free_guidance")


class Subclass(library.GaussianDiffusion):
    """A class of a user's, with a step of its own."""

    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        image, x_start = super().p_sample(x, t, x_self_cond)
        return 0.98 * image, x_start


class Plain(nn.Module):
    """A network of a user's, which takes x, t and no more."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.out_dim = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.conv(x) + (t.view(-1, 1, 1, 1) / 50).cos()


class Case(NamedTuple):
    """A configuration: what it is in words, the object, options of `accelerate`, and the call."""

    words: dict[str, Any]
    diffusion: Any
    options: dict[str, Any]
    method: str
    arguments: dict[str, Any]


def case(seed: int) -> Case:
    """Draw a configuration."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pick: Callable[..., Any] = lambda *values: rng.choice(values)  # noqa: E731
    kind, channels, batch = pick(*_KINDS), pick(1, 3), pick(1, 2, 3)
    network: dict[str, Any] = {
        "dim": pick(4, 8), "dim_mults": pick((1,), (1, 2), (1, 2, 2)), "channels": channels,
        "init_dim": pick(None, 6),
    }  # fmt: skip
    if kind not in ("guided_diffusion", "classifier_free_guidance"):
        network["self_condition"] = pick(True, False)
    if kind not in ("guided_diffusion", "GaussianDiffusion1D"):
        network |= {"attn_dim_head": pick(4, 8), "attn_heads": pick(1, 2)}
    total = pick(22, 30, 50)
    fields: dict[str, Any] = {"timesteps": total, "objective": pick("pred_noise", "pred_x0", "pred_v")}
    fields["beta_schedule"] = pick("linear", "cosine", *(() if kind in _WITHOUT_SIGMOID else ("sigmoid",)))
    fields["sampling_timesteps"] = pick(None, None, 1, 2, 7, total - 1)
    fields["ddim_sampling_eta"] = pick(0.0, 0.0, 0.5, 1.0)
    call: dict[str, Any] = {"batch_size": batch}
    size: Any = pick(8, 16)
    if kind in ("GaussianDiffusion", "repaint", "LearnedGaussianDiffusion", "subclass"):
        fields["auto_normalize"] = pick(True, True, False)
        size = pick(size, (8, 16))
        call["return_all_timesteps"] = pick(True, False)
    method = "sample"
    continuous = kind.endswith("ContinuousTimeGaussianDiffusion") or kind in ("simple_diffusion", "ElucidatedDiffusion")
    if continuous:
        fields = {"num_sample_steps": pick(2, 5, 12), "channels": channels}
        network["learned_sinusoidal_cond"] = True
        if kind != "ElucidatedDiffusion":
            network["self_condition"] = False
            fields["clip_sample_denoised"] = pick(True, True, False)
    diffusion = _object(kind, network, fields, size, pick)
    if kind == "classifier_free_guidance":
        del call["batch_size"]
        call["classes"] = torch.randint(4, (batch,))
        call |= {"cond_scale": pick(1.5, 3.0, 6.0, 0.0), "rescaled_phi": pick(0.0, 0.7, 1.0)}
    elif kind == "GaussianDiffusion1D":
        call["return_noise"] = False
    elif kind == "repaint" and pick(True, False):
        shape = (batch, channels, *(size if isinstance(size, tuple) else (size, size)))
        call |= {"gt": torch.rand(shape), "mask": (torch.rand(batch, 1, *shape[2:]) > 0.5).float()}
        call |= {"resample_iter": pick(1, 2), "resample_jump": pick(1, 3), "resample_every": pick(7, 20)}
    elif kind == "ElucidatedDiffusion":
        method = pick("sample", "sample", "sample_using_dpmpp")
        call["num_sample_steps"] = pick(None, 4, 9)
        if method == "sample":
            call["clamp"] = pick(True, True, False)
    options = {"freeze": pick(None, None, False)}
    words = {"seed": seed, "class": kind, "network": network, "fields": fields, "size": size, **options}
    shown = {name: value for name, value in call.items() if not isinstance(value, Tensor)}
    return Case(words | {"method": method, "call": shown}, diffusion.eval(), options, method, call)


def _object(kind: str, network: dict[str, Any], fields: dict[str, Any], size: Any, pick: Callable[..., Any]) -> Any:
    """Return the diffusion; `network` and `fields` are completed by what a class needs."""
    if kind == "GaussianDiffusion1D":
        return library.GaussianDiffusion1D(library.Unet1D(**network), seq_length=16, **fields)
    fields["image_size"] = size
    if kind == "classifier_free_guidance":
        fields |= {"use_cfg_plus_plus": pick(True, False), "offset_noise_strength": pick(0.0, 0.1)}
        unet = classifier_free_guidance.Unet(num_classes=4, **network)
        return classifier_free_guidance.GaussianDiffusion(unet, **fields)
    if kind == "guided_diffusion":
        network["init_dim"] = None
        return guided_diffusion.GaussianDiffusion(guided_diffusion.Unet(**network), **fields)
    if kind == "repaint":
        return repaint.GaussianDiffusion(repaint.Unet(**network), **fields)
    if kind == "LearnedGaussianDiffusion":
        network |= {"learned_variance": True, "self_condition": False}
        fields["sampling_timesteps"] = pick(None, None, fields["sampling_timesteps"])
        return library.LearnedGaussianDiffusion(library.Unet(**network), **fields)
    if kind == "WeightedObjectiveGaussianDiffusion":
        network |= {"out_dim": 2 * network["channels"] + 2, "self_condition": False}
        fields["sampling_timesteps"] = None
        return library.WeightedObjectiveGaussianDiffusion(library.Unet(**network), **fields)
    if kind == "simple_diffusion":
        fields["pred_objective"] = pick("v", "eps")
        return simple_diffusion.GaussianDiffusion(Plain(network["channels"]), **fields)
    if kind == "ContinuousTimeGaussianDiffusion":
        fields["noise_schedule"] = pick("linear", "cosine", "learned")
    if kind == "ElucidatedDiffusion":
        fields |= {"S_churn": pick(0, 10, 80), "sigma_max": pick(5, 80)}
    if kind in ("GaussianDiffusion", "subclass"):
        fields |= {"min_snr_loss_weight": pick(True, False), "immiscible": pick(True, False)}
        network |= {"full_attn": pick(None, True), "dropout": pick(0.0, 0.2)}
        if pick(True, False, False, False):
            model: nn.Module = Plain(network["channels"])
            network.clear()
            network["model"] = "Plain"
            return (Subclass if kind == "subclass" else library.GaussianDiffusion)(model, **fields)
    made = Subclass if kind == "subclass" else getattr(library, kind)
    return made(library.Unet(**network), **fields)


def drawn(diffusion: Any, given: Case) -> tuple[Tensor, Tensor]:
    """Return the images of a call, and what torch's generator draws next."""
    torch.manual_seed(11)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        images = getattr(diffusion, given.method)(**given.arguments)
    return images, torch.randn(4)


def verdict(given: Case) -> tuple[str, str]:
    """Return the verdict, and what there is to say about it."""
    network = given.diffusion.net if hasattr(given.diffusion, "net") else given.diffusion.model
    theirs, original = None, ""
    try:
        theirs, theirs_next = drawn(given.diffusion, given)
    except Exception as error:
        original = f"{type(error).__name__}: {error}"
    else:
        generator = torch.Generator().manual_seed(given.words["seed"])

        def rounded(*arguments: Any, **named: Any) -> Tensor:
            out = type(network).forward(network, *arguments, **named)
            noise = torch.randn(out.shape, generator=generator)
            return out + _PERTURBATION * out.square().mean().sqrt() * noise

        network.forward = rounded  # no hook: guidance calls `forward` itself
        perturbed, _ = drawn(given.diffusion, given)
        del network.forward
    try:
        ours, ours_next = drawn(accelerate(given.diffusion, noise="torch", progress=False, **given.options), given)
    except (ValueError, TypeError) as error:
        if original and not str(error).count("\n"):
            return "original fails", f"{original}; ours: {error}"
        said = str(error)
        return ("refused" if "\n" not in said and " is " in said else "crash"), said
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if theirs is None:
        return "original fails", f"{original}; ours draws {list(ours.shape)}"
    if theirs.shape != ours.shape or not torch.equal(theirs_next, ours_next):
        return "different", "in shape or in how much it draws"
    apart, costs = (float((images - theirs).abs().max()) for images in (ours, perturbed))
    bound = 1e-5 * max(1.0, float(theirs.abs().max())) + 8 * costs
    return ("equal" if apart <= bound else "different"), f"{apart:.1e}, of at most {bound:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """Run the grid, print what is not equal, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further one after so long")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    counts: collections.Counter[str] = collections.Counter()
    by_class: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    other = []
    seed, start = options.first, time.monotonic()
    for seed in range(options.first, options.first + options.count):
        if time.monotonic() - start > options.seconds:
            seed -= 1
            break
        given = case(seed)
        found, said = verdict(given)
        counts[found] += 1
        by_class[given.words["class"]][found] += 1
        if found != "equal":
            other.append({"verdict": found, "said": said, **given.words})
        if found not in ("equal", "original fails"):
            print(seed, found, said, given.words, flush=True)
    result = {
        "versions": {"torch": torch.__version__, "denoising_diffusion_pytorch": _version()},
        "seeds": [options.first, seed],
        "counts": {name: counts[name] for name in ("equal", "different", "crash", "refused", "original fails")},
        "by_class": {name: dict(sorted(each.items())) for name, each in sorted(by_class.items())},
        "original_fails": sorted({each["said"] for each in other if each["verdict"] == "original fails"}),
        "not_equal": [each for each in other if each["verdict"] not in ("equal", "original fails")],
    }
    print(json.dumps(result["counts"]))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return int(bool(counts["different"] or counts["crash"]))


def _version() -> str:
    from importlib.metadata import version

    return version("denoising_diffusion_pytorch")


if __name__ == "__main__":
    sys.exit(main())
