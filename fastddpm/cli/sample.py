"""`fastddpm sample`: draw samples from a model."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from fastddpm.cli import options as shared
from fastddpm.cli import outputs, prompts, shards
from fastddpm.cli.model import MODEL_HELP, add_model_options, check_count, open_model
from fastddpm.cli.options import check_labels, integer, integers

if TYPE_CHECKING:
    from fastddpm.interop.pretrained import Pretrained


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    sample = commands.add_parser(
        "sample",
        help="draw samples from a model and write them to a file",
        description="Draw samples from a model and write them to a file. Without MODEL it is the bundled model of "
        "handwritten digits: 100 samples, ten of each class.",
    )
    sample.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    sample.add_argument(
        "-n", "--num-samples", type=integer(1), metavar="N",
        help="how many (default: one per class label given; else 100 for the bundled model, 16 for others)",
    )  # fmt: skip
    sample.add_argument(
        "--class-labels", type=integers, metavar="L,L,...",
        help="classes to draw, repeated in turn until there are N (default: all classes in equal numbers)",
    )  # fmt: skip
    add_model_options(sample)
    shared.add_sampler_options(sample, steps=None, method=None, seed=0)
    outputs.add_output_options(sample, "samples.png", "a grid")
    prompts.add_prompt_options(sample)
    shards.add_shard_options(sample)
    sample.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> None:
    from fastddpm.common.images import check_canvas, check_drawable, grid, grid_size
    from fastddpm.networks.frozen import blueprint_of

    texts = prompts.prompts_of(options) if prompts.wants_prompts(options) else None
    if texts is not None and not prompts.is_trained(options):
        return prompts.sample_prompts(options)
    if shards.wants_shards(options):
        if texts is not None:
            raise ValueError("--prompt is given, but shards do not take it: draw into one file or folder")
        return shards.sample_shards(options)
    kind = outputs.check_outputs(options)
    model = open_model(options, latents=True)
    kind_of = blueprint_of(model.unet)
    if texts is None and kind_of is not None and kind_of(model.unet).conditions:
        raise ValueError(f"--prompt is not given, must be: MODEL is {options.model}, which draws what a text says")
    if model.decoder is not None and outputs.recording(options, kind, 1):
        name = "output" if kind == ".gif" else "trajectory"
        raise ValueError(f"--{name} is {getattr(options, name)}, which shows states, but those of MODEL are latents")
    check_count(model, options.num_samples or 1, "--num-samples")
    sampler = shared.make_sampler(options, model)
    shape = sampler.network.sample_shape(sampler.settings.learned_variance)
    if model.decoder is None and (kind != ".npz" or options.trajectory is not None):
        check_drawable(shape[0])
    labels, told = _choose_labels(options, model) if texts is None else prompts.tell(options, model, texts)
    count = len(labels) if labels else options.num_samples or 16
    if kind in (".png", ".gif"):
        check_canvas(*grid_size(count, shape[1:], labels), kind)
    steps = len(sampler.timesteps)
    start = time.perf_counter()
    result = sampler.sample(
        count, seed=options.seed, batch_size=options.batch_size, progress=True,
        **told, **outputs.recording(options, kind, steps),
    )  # fmt: skip
    # Copy before taking the time, because the copy to the CPU waits for the device.
    images, trajectory = outputs.images_of(result if model.decoder is None else model.decode(result))
    seconds = time.perf_counter() - start
    print(
        f"{count} images, {steps} steps, in {seconds:.1f} s: {count / seconds:.2f} images/s, "
        f"{1000 * seconds / (steps * count):.3g} ms per image and step"
    )
    shared.report_device(sampler)
    finite = outputs.finite_rows(images)
    drawn = None if labels is None else [label for label, ok in zip(labels, finite.tolist(), strict=True) if ok]
    outputs.write_outputs(
        options, kind, images, labels,
        picture=lambda: prompts.picture(images, texts) if texts else grid(images[finite], drawn),
        frames=lambda: outputs.frames_of(trajectory, labels), trajectory=trajectory,
    )  # fmt: skip


def _choose_labels(options: argparse.Namespace, model: Pretrained) -> tuple[list[int] | None, dict[str, Any]]:
    """Return the label of every sample, and it as an argument of the sampler.

    They are the requested ones in turn, else the trained ones in equal numbers, sorted.
    """
    given, count = options.class_labels, options.num_samples
    check_labels(given, model.unet.config)
    classes = model.labels()
    if not classes:
        return None, {}
    if given is None:
        count = count or (100 if options.model is None else 16)
        labels = [classes[i * len(classes) // count] for i in range(count)]
    else:
        labels = [given[i % len(given)] for i in range(count or len(given))]
    return labels, {"class_labels": labels}
