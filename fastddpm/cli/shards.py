"""`fastddpm sample --shard-size`: draw many samples into a folder of shards; `fastddpm merge`: join them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli import options as shared
from fastddpm.cli.model import open_model
from fastddpm.cli.options import integer
from fastddpm.cli.outputs import Unfinished, check_output

if TYPE_CHECKING:
    import numpy as np

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.scale.job import Report

SHARD_SIZE = 512
FORMATS = ("npz", "png", "wds")
ENGINES = ("local", "ray")


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make `sample` write shards."""
    group = parser.add_argument_group(
        "many samples",
        "into a folder, which a second start completes; torchrun, accelerate launch and SLURM arrays "
        "share the work by rank"
    )  # fmt: skip
    add = group.add_argument
    add("--shard-size", type=integer(1), metavar="K",
        help=f"samples of a shard; --output is then a folder, or a URL such as s3://bucket/samples (default with "
             f"--format or --engine: {SHARD_SIZE})")  # fmt: skip
    add("--format", choices=FORMATS, help="of shards: npz, folders of png, or WebDataset's .tar (default: npz)")
    add("--engine", choices=ENGINES, help="this process, or the actors of a Ray cluster (default: local)")
    add("--address", metavar="ADDRESS", help="of the Ray cluster, such as auto (default: one is started here)")
    add("--workers", type=integer(1), metavar="N", help="Ray's actors (default: one per GPU, or else per CPU)")


def wants_shards(options: argparse.Namespace) -> bool:
    """Return whether the options ask for shards.

    Raises:
        ValueError: an option needs Ray, and the options do not ask for shards.
    """
    if options.shard_size or options.format or options.engine:
        return True
    for name in ("address", "workers"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is given but --engine is not, must be ray")
    return False


@dataclass
class _Source:
    """Loads the model that the options name, also in other processes."""

    options: argparse.Namespace

    def __call__(self) -> Any:
        model = open_model(self.options, latents=True)
        return shared.make_sampler(self.options, model), model.decode if model.decoder is not None else None


def sample_shards(options: argparse.Namespace) -> None:
    """Draw samples into the folder or URL --output."""
    from fastddpm import scale

    if options.trajectory is not None:
        raise ValueError(f"--trajectory is {options.trajectory}, but shards have none")
    if isinstance(options.output, Path):
        if options.output.suffix.lower() in (".png", ".npz", ".gif"):
            raise ValueError(f"--output is {options.output}, must be a folder with --shard-size")
        check_output("--output", options.output)
    _own_device(options)
    model = open_model(options, latents=True)
    count = options.num_samples or 16
    labels: Any = _labels(options, model, count)
    source: Any = _Source(_plain(options))
    if options.engine != "ray":
        sampler = shared.make_sampler(options, model)
        decode = model.decode if model.decoder is not None else None

        def source() -> Any:
            return sampler, decode

    del model
    start = time.perf_counter()
    try:
        report = scale.sample_shards(
            source, options.output, count, shard_size=options.shard_size or SHARD_SIZE,
            format=options.format or "npz", seed=options.seed, class_labels=labels, batch_size=options.batch_size,
            engine=options.engine or "local", address=options.address, workers=options.workers,
        )  # fmt: skip
    except scale.Incomplete as error:
        raise Unfinished(str(error)) from error
    _tell(report, options.output, time.perf_counter() - start)


def _plain(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options without the parser's functions, so that they can be sent to other processes."""
    return argparse.Namespace(**{name: value for name, value in vars(options).items() if not callable(value)})


def _own_device(options: argparse.Namespace) -> None:
    """Take the GPU that torchrun or accelerate launch assigns to this process."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    if options.device in (None, "cuda") and local.isdecimal() and torch.cuda.device_count() > 1:
        options.device = f"cuda:{int(local) % torch.cuda.device_count()}"


def _labels(options: argparse.Namespace, model: Pretrained, count: int) -> np.ndarray | None:
    """Return the label of every sample, int64 [count]; `fastddpm sample` without shards chooses the same."""
    import numpy as np

    from fastddpm.common.images import check_memory

    shared.check_labels(options.class_labels, model.unet.config)
    classes = model.labels()
    if not classes:
        return None
    check_memory(24 * count, f"--num-samples {count}: labels")
    places = np.arange(count, dtype=np.int64)
    if options.class_labels is None:
        return np.asarray(classes, dtype=np.int64)[places * len(classes) // count]
    return np.asarray(options.class_labels, dtype=np.int64)[places % len(options.class_labels)]


def _tell(report: Report, output: Any, seconds: float) -> None:
    shards = report.written + report.kept
    print(
        f"{report.samples} samples in {shards} shards, {report.written} of them drawn now, in {seconds:.1f} s; in "
        f"{output}"
    )
    for words in report.damaged:
        print(f"{words} was damaged and is drawn again", file=sys.stderr)
    if report.missing:
        print(f"{len(report.missing)} ranges of other processes are not there yet")
    for words, reason in report.failed.items():
        print(f"fastddpm sample: error: {words}: {reason}; others still draw", file=sys.stderr)


def add_commands(commands: Any) -> None:
    """Add `merge` to the parser."""
    merge = commands.add_parser(
        "merge",
        help="make one .npz of a folder of shards",
        description="Make one .npz of the shards that `fastddpm sample --shard-size` wrote, as evaluators read it: "
        "arr_0 uint8 [N, H, W, 3], arr_1 labels. Every shard is checked; memory holds one at a time.",
    )
    merge.add_argument("folder", type=Path, metavar="FOLDER", help="of shards, all of them there")
    merge.add_argument("output", type=Path, metavar="PATH.npz", help="the file to write")
    merge.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> None:
    from fastddpm.scale import merge

    check_output("PATH", options.output, ".npz")
    count = merge(options.folder, options.output)
    print(f"wrote {count} samples to {options.output}")
