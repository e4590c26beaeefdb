"""Map the ranges of a job over actors of Ray Data, which replaces actors that die.

Ray's own defaults retry for ever. Here an actor is restarted, and a range tried again, a few times; then the job ends,
and says so.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastddpm.scale.errors import Incomplete
from fastddpm.scale.places import Place, open_place
from fastddpm.scale.recipe import Recipe
from fastddpm.scale.worker import Outcome

RESTARTS = 4  # of an actor, and of a range


class Settler:
    """An actor: it loads the model once and settles the ranges that it is given."""

    def __init__(self, recipe: Recipe, out: str, content: bytes, present: set[str]) -> None:
        self._worker = recipe.worker(open_place(out), content, present)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Settle the ranges in `batch["id"]`."""
        outcomes = [self._worker.settle(int(index)) for index in batch["id"]]
        return {
            "index": np.asarray([outcome.index for outcome in outcomes]),
            "what": np.asarray([outcome.what for outcome in outcomes]),
            "reason": np.asarray([outcome.reason for outcome in outcomes]),
        }


class Session:
    """A connection to a cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        resources = ray.cluster_resources()
        self._gpus, self._cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))

    def manifest(self, recipe: Recipe) -> dict[str, Any]:
        """Return the manifest as a worker computes it: the driver may have no GPU."""
        task = self._ray.remote(num_cpus=1, num_gpus=1 if self._gpus else 0, max_retries=RESTARTS)(Recipe.manifest)
        try:
            return self._ray.get(task.remote(recipe))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError | TypeError | OSError | ModuleNotFoundError):
                raise cause from None
            raise Incomplete(f"Ray: {_first_line(error)}; nothing is saved yet") from error
        except self._ray.exceptions.RayError as error:
            raise Incomplete(f"Ray: {_first_line(error)}; nothing is saved yet") from error

    def settle(self, recipe: Recipe, place: Place, content: bytes, workers: int | None) -> Iterator[Outcome]:
        """Yield the outcome of every range, in any order.

        Raises:
            Incomplete: a range or an actor failed more often than it is tried again.
        """
        from ray.data import ActorPoolStrategy, DataContext
        from ray.data import range as ray_range

        count = -(-recipe.num_samples // recipe.shard_size)
        room = self._gpus or max(1, self._cpus - 1)  # a CPU is left for Ray's own tasks
        most = min(count, workers or room)
        if not self._gpus and most >= self._cpus:
            raise ValueError(f"workers is {workers} but the cluster has {self._cpus} CPUs, must be at most {room}")
        context = DataContext.get_current().copy()
        context.max_errored_blocks = 0
        context.enable_progress_bars = False
        with DataContext.current(context), warnings.catch_warnings():
            # There is no other way to say how often to retry until the release that removes this one.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            results = ray_range(count, override_num_blocks=count).map_batches(
                Settler,
                batch_size=1,
                compute=ActorPoolStrategy(min_size=1, initial_size=most, max_size=most),
                num_gpus=1 if self._gpus else None,
                num_cpus=None if self._gpus else 1,
                fn_constructor_args=(recipe, str(place), content, place.names()),
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
            try:
                for row in results.iter_rows():
                    yield Outcome(int(row["index"]), str(row["what"]), str(row["reason"]))
            except self._ray.exceptions.RayError as error:
                raise Incomplete(f"Ray: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else ''}"


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[Session]:
    """Connect to the cluster at `address`, or start one on this machine, unless the process has one already.

    One that is started has a CPU more than `workers`: Ray Data's own tasks need one beside the actors, and wait for it
    for ever.

    Raises:
        ModuleNotFoundError: Ray Data is not installed.
        ValueError: there is no cluster at `address`.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ModuleNotFoundError("engine 'ray' needs Ray Data: pip install 'fastddpm[ray]'") from None
    if ray.is_initialized():
        yield Session(ray)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else max(os.cpu_count() or 1, (workers or 1) + 1),
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"address is {address!r}, must be of a Ray cluster: {_first_line(error)}") from None
    try:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)  # ray sets its own
        yield Session(ray)
    finally:
        ray.shutdown()
