"""Draw many samples into a folder of shards: ranges without order, so that any process can do any of them at any time.

Range i is rank i % world's. No process waits for another, and starting again does what is missing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.common.shards import FORMATS, MANIFEST, MOST_FILES, Layout, few_ranges, layout_of, parse_manifest
from fastddpm.scale.drawing import Source
from fastddpm.scale.errors import Incomplete
from fastddpm.scale.identity import difference
from fastddpm.scale.places import LocalPlace, Place, open_place
from fastddpm.scale.progress import watching
from fastddpm.scale.ranks import Rank, holding, others_work, rank_of
from fastddpm.scale.recipe import Recipe, to_bytes
from fastddpm.scale.worker import FAILED, KEPT, Outcome

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Report:
    """The result of a call of `sample_shards`.

    Attributes:
        written, kept: ranges that it drew, and ranges whose shard was already whole.
        failed: ranges whose samples are not finite, with the reason, by `<first>-<last>`.
        damaged: ranges that were drawn again because their shard was damaged.
        missing: ranges of other processes that were not written yet.
        samples: those in the ranges written and kept.
    """

    written: int
    kept: int
    failed: dict[str, str]
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    samples: int


def sample_shards(
    model: Source,
    out: str | os.PathLike[str],
    num_samples: int,
    *,
    shard_size: int = 512,
    format: str = "npz",
    seed: int = 0,
    class_labels: int | Sequence[int] | Tensor | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int | str | None = "auto",
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    rank: tuple[int, int] | None = None,
    progress: bool = True,
) -> Report:
    """Draw samples 0 to `num_samples` - 1 of a seed into shards in `out`, skipping existing shards.

    A range that is interrupted leaves nothing. A shard that is damaged is drawn again. A range with samples that are
    not finite is marked as failed, and the others go on. The folder ends byte for byte the same, however often the job
    was interrupted and by however many processes it was done, on one kind of device.

    Args:
        model: a `Sampler`; a `Pretrained` or the path of a model, with the model's own settings; or a function without
            arguments that returns a `Sampler`, or a sampler and what decodes its samples.
        out: a folder, new, empty, or of the same job; or a URL of fsspec, such as s3://bucket/samples.
        num_samples: the number of samples.
        shard_size: samples of a shard. A multiple of `batch_size` wastes nothing.
        format: "npz" (arr_0 uint8 [n, H, W, C], or float32 [n, ...] where samples are no images; arr_1 int64 labels),
            "png" (a folder of pictures per shard) or "wds" (WebDataset's .tar).
        seed: sample k of it is the same in every job of the model.
        class_labels: one for all, or one per sample.
        shape: of a sample, for a model that does not say it.
        batch_size: samples in every pass through the network. "auto" is 64 on CUDA, else 16. Where memory runs out it
            is halved for the rest of the process.
        engine: "local", in this process, or "ray", on the actors of a Ray cluster.
        address: of the cluster; None starts one on this machine.
        workers: how many actors; None for one per GPU, or without one, per CPU.
        rank: (rank, world), None for what torchrun, accelerate launch or a SLURM array set in the environment.
        progress: show it on standard error, on rank 0.

    Raises:
        ValueError, TypeError: an argument is wrong, `out` holds something else or another job (the message names the
            difference), or is in use.
        ModuleNotFoundError: the engine, or a library for `out`, is not installed.
        Incomplete: a fault of the machine ended the job, or ranges failed and no other process is at work.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, must be one of {', '.join(ENGINES)}")
    if engine == "local" and (address is not None or workers is not None):
        raise ValueError(f"{'workers' if address is None else 'address'} is given but engine is 'local', must be 'ray'")
    recipe = _recipe(model, num_samples, shard_size, format, seed, class_labels, shape, batch_size)
    place_in = _rank(rank) if engine == "local" else Rank()
    count = -(-recipe.num_samples // recipe.shard_size)
    if place_in.world > count:
        raise ValueError(f"{place_in.world} ranks share {count} ranges, must be at most as many; lower shard_size")
    place = open_place(out, place_in)
    _check_free(place)
    recipe.labels()  # raises for bad ones, before anything is loaded or written
    if engine == "ray":
        from fastddpm.scale import ray_engine

        with ray_engine.cluster(address, workers) as session:
            manifest = session.manifest(recipe)
            with _occupied(place, place_in):
                content = _claim(place, manifest)
                layout = layout_of(parse_manifest(content, _manifest_of(place)), content)
                with watching(layout, count, recipe.num_samples, shown=progress) as watch:
                    outcomes = _collect(session.settle(recipe, place, content, workers), layout, place, watch)
    else:
        manifest = recipe.manifest()
        with _occupied(place, place_in):
            content = _claim(place, manifest)
            worker = recipe.worker(place, content, place.names())
            layout = worker.layout
            mine = range(place_in.rank, count, place_in.world)
            samples = sum(end - first for first, end in map(layout.bounds, mine))
            with watching(layout, len(mine), samples, shown=progress and place_in.rank == 0) as watch:
                outcomes = _collect(map(worker.settle, mine), layout, place, watch)
    return _finish(outcomes, layout, place, place_in)


def _recipe(
    model: Source, num_samples: int, shard_size: int, format: str, seed: int, class_labels: Any,
    shape: Sequence[int] | None, batch_size: int | str | None,
) -> Recipe:  # fmt: skip
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, must be one of {', '.join(FORMATS)}")
    size = checks.positive(shard_size, "shard_size")
    if format == "png" and size > MOST_FILES:
        raise ValueError(f"shard_size is {size}, must be at most {MOST_FILES} with format 'png': a folder's files")
    count = checks.positive(num_samples, "num_samples")
    batch_size = checks.batch_size(batch_size)
    if count > 2**32 - 2**14:
        raise ValueError(f"num_samples is {count}, must be at most {2**32 - 2**14}, the samples of a seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, must be an integer from 0 to 2**64 - 1")
    return Recipe(
        model,
        count,
        size,
        format,
        seed,
        class_labels,
        None if shape is None else checks.sample_shape(shape),
        batch_size,
    )


def _rank(given: tuple[int, int] | None) -> Rank:
    if given is None:
        return rank_of(os.environ)
    rank = Rank(*given)
    if rank.world < 1 or not 0 <= rank.rank < rank.world:
        raise ValueError(f"rank is {tuple(given)}, must be (rank, world) with rank from 0 to world - 1")
    return rank


def _manifest_of(place: Place) -> str:
    return f"{place}/{MANIFEST}"


def _check_free(place: Place) -> None:
    """Raise ValueError if the place holds anything other than a job of this package."""
    if isinstance(place, LocalPlace) and place.folder.exists() and not place.folder.is_dir():
        raise ValueError(f"output is {place}, which is a file; it must be a folder")
    if place.exists(MANIFEST):
        parse_manifest(place.read(MANIFEST), _manifest_of(place))
        return
    held = [name for name in place.names() if not name.startswith(".")]
    if held and not place.exists(MANIFEST):  # another rank may have begun just now
        raise ValueError(f"output is {place}, a folder that has {len(held)} files and no manifest of shards; it must "
                         "be empty or a new one")  # fmt: skip


@contextmanager
def _occupied(place: Place, rank: Rank) -> Iterator[None]:
    """Hold a folder, and remove unfinished files from it."""
    if not isinstance(place, LocalPlace):
        yield
        return
    try:
        lock = holding(place.folder, rank)
        lock.__enter__()
    except OSError as error:
        raise ValueError(f"output is {place}, which cannot be written: {error.strerror}") from None
    try:
        place.tidy()
        yield
    finally:
        place.leave()
        lock.__exit__(None, None, None)


def _claim(place: Place, manifest: dict[str, Any]) -> bytes:
    """Return the content of the place's manifest: the one given, or that of the job begun there if it is the same.

    Raises:
        ValueError: it is another job's.
        Incomplete: it cannot be written.
    """
    try:
        if not place.exists(MANIFEST):
            place.create(MANIFEST, to_bytes(manifest))
        content = place.read(MANIFEST)
    except OSError as error:
        raise Incomplete(f"{_manifest_of(place)}: {error.strerror or error}; nothing is saved yet") from error
    known = parse_manifest(content, _manifest_of(place))
    if differs := difference(known, manifest):
        raise ValueError(f"output is {place}, which holds another job: {differs}; it must be the same or a new folder")
    if changed := [
        f"{name} was {known['versions'].get(name)}, is {now}"
        for name, now in manifest["versions"].items()
        if known.get("versions", {}).get(name) != now
    ]:
        warnings.warn(
            f"{place} was begun by other versions, whose last digits may differ: {'; '.join(changed)}",
            RuntimeWarning,
            stacklevel=3,
        )
    return content


def _collect(results: Iterator[Outcome], layout: Layout, place: Place, watch: Any) -> list[Outcome]:
    """Return all outcomes; if the machine fails, report what is saved."""
    outcomes: list[Outcome] = []
    try:
        for outcome in results:
            outcomes.append(outcome)
            watch(outcome)
    except (OSError, torch.OutOfMemoryError, Incomplete) as error:
        saved = sum(outcome.what != FAILED for outcome in outcomes)
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError):
            reason += "; use a smaller batch_size in another folder, or a device with more memory"
        raise Incomplete(
            f"{place}: {reason}; {saved} of {len(layout)} ranges are saved by this process, and the same command "
            "continues with what is missing"
        ) from error
    return outcomes


def _finish(outcomes: list[Outcome], layout: Layout, place: Place, rank: Rank) -> Report:
    """Look at the whole place once the lock is released, and report.

    Raises:
        Incomplete: ranges failed and no other process is at work, or this process's own are not there.
    """
    names = place.names()
    absent = [index for index in range(len(layout)) if layout.name(index) not in names]
    failed = {outcome.index: outcome.reason for outcome in outcomes if outcome.what == FAILED}
    marked = [index for index in absent if layout.failure(index) in names]
    lost = [index for index in absent if index not in marked and index % rank.world == rank.rank]
    working = isinstance(place, LocalPlace) and others_work(place.folder)
    if lost or (marked and not working):
        parts = [f"{len(marked)} of {len(layout)} ranges failed: {few_ranges(layout, marked)}"] if marked else []
        if marked and (reason := failed.get(marked[0])):
            parts[0] += f" ({reason})"
        if lost:
            parts.append(f"{len(lost)} ranges are missing: {few_ranges(layout, lost)}")
        raise Incomplete(
            f"{place}: {'; '.join(parts)}; {len(layout) - len(absent)} ranges are saved, and the same command tries "
            "the others again"
        )
    done = [outcome for outcome in outcomes if outcome.what != FAILED]
    return Report(
        written=sum(outcome.what != KEPT for outcome in done),
        kept=sum(outcome.what == KEPT for outcome in done),
        failed={layout.words(index): reason for index, reason in failed.items()},
        damaged=tuple(layout.words(outcome.index) for outcome in done if outcome.reason),
        missing=tuple(layout.words(index) for index in absent if index not in failed),
        samples=sum(end - first for first, end in (layout.bounds(outcome.index) for outcome in done)),
    )
