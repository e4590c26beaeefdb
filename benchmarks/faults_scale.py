"""Break jobs of shards in every way that takes long, count what was lost, and write the counts.

    python benchmarks/faults_scale.py [--kills 20] [--shards 10000] [--out benchmarks/results/faults_scale.json]

A child draws shards and is killed at a random moment, as often as is said; the next one goes on. At the end the folder
is compared with that of a run that nothing interrupted. Then one process draws many shards of a tiny model, and its
memory, handles, threads and loops are counted on the way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.results import commit_here

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.common.shards import ShardFolder
from fastddpm.scale import merge, sample_shards
from fastddpm.scale import worker as working

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip
JOB: dict[str, Any] = {"shard_size": 8, "batch_size": 8, "progress": False}


def tiny_sampler(steps: int = 2) -> Sampler:
    torch.manual_seed(0)
    return Sampler(UNet(**TINY), NoiseSchedule.linear(), method="ddim", num_inference_steps=steps)


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def child(out: Path, count: int, format: str) -> None:
    """Draw, after saying that the model is there: kills before that would only test Python's start."""
    sampler = tiny_sampler(20)
    print("ready", flush=True)
    sample_shards(sampler, out, count, format=format, **JOB)


def kills(folder: Path, times: int, sign: signal.Signals, format: str, seed: int) -> dict[str, Any]:
    """Send a signal at random moments, and return what was found after each and at the end."""
    rng = random.Random(seed)
    count = 8 * 4000
    found = {
        "signal": sign.name, "format": format, "sent": 0, "exit_codes": {}, "half_written": 0, "shards_at_kills": [],
        "temporaries_left_by_kills": 0,
    }  # fmt: skip
    out, done = folder / f"{sign.name}-{format}", {}
    for _ in range(times):
        command = [sys.executable, __file__, "--child", str(out), "--count", str(count), "--format", format]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(sign)
        code = str(process.wait())
        found["sent"] += 1
        found["exit_codes"][code] = found["exit_codes"].get(code, 0) + 1
        now = contents(out) if out.exists() else {}
        shown = {name: digest for name, digest in now.items() if not name.startswith(".")}
        found["temporaries_left_by_kills"] += sum(name.startswith(".unfinished") for name in now)
        found["half_written"] += sum(shown.get(name) != digest for name, digest in done.items())
        found["shards_at_kills"].append(sum(name.startswith("shard-") for name in shown))
        done = shown
    return found | finish(folder, out, count, format, done)


def finish(folder: Path, out: Path, count: int, format: str, done: dict[str, str]) -> dict[str, Any]:
    """Shrink the job to what is done and some more, end it, and compare it with an uninterrupted one."""
    del count, done
    last = max((int(path.name.split("-")[1]) for path in out.glob("shard-*")), default=0) // 8
    manifest = json.loads((out / "manifest.json").read_text())
    whole = folder / f"whole-{format}"
    sampler = tiny_sampler(20)
    # Only the first shards of the uninterrupted job are drawn: as a rank of so many that one has them all.
    _first_shards(sampler, whole, manifest["num_samples"], format, last + 3)
    _first_shards(sampler, out, manifest["num_samples"], format, last + 3)
    want, got = contents(whole), contents(out)
    shutil.rmtree(whole)
    return {
        "shards_at_end": sum("shard-" in name.split("/")[0] for name in got),
        "lost": len(set(want) - set(got)),
        "twice_or_left_over": len(set(got) - set(want)),
        "differ": sum(got[name] != want[name] for name in set(got) & set(want)),
    }


class _Enough(BaseException):
    pass


def _first_shards(sampler: Sampler, out: Path, count: int, format: str, shards: int) -> None:
    """Run a job and stop it after so many shards, by an exception as Ctrl-C's."""
    settle = working.Worker.settle

    def stop(self: working.Worker, index: int) -> working.Outcome:
        if index >= shards:
            raise _Enough
        return settle(self, index)

    working.Worker.settle = stop  # type: ignore[method-assign]
    try:
        sample_shards(sampler, out, count, format=format, **JOB)
    except _Enough:
        pass
    finally:
        working.Worker.settle = settle  # type: ignore[method-assign]


def long_run(folder: Path, shards: int) -> dict[str, Any]:
    """Draw many shards in this process, and return what it held on the way."""
    sampler = tiny_sampler()
    rows: list[dict[str, int]] = []
    settle = working.Worker.settle

    def counted(self: working.Worker, index: int) -> working.Outcome:
        if index % max(1, shards // 10) == 50 or index == shards - 1:
            with open("/proc/self/statm", encoding="ascii") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            rows.append({
                "shard": index, "resident_kib": resident // 1024, "handles": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")), "loops_built": sampler._pool.built,
            })  # fmt: skip
        return settle(self, index)

    working.Worker.settle = counted  # type: ignore[method-assign]
    start = time.monotonic()
    try:
        sample_shards(sampler, folder / "long", 8 * shards - 3, **JOB)
    finally:
        working.Worker.settle = settle  # type: ignore[method-assign]
    seconds = time.monotonic() - start
    drawn = sum(len(each.values) for each in ShardFolder(folder / "long"))
    assert drawn == 8 * shards - 3
    merge(folder / "long", folder / "long.npz", progress=False)
    manifest = (folder / "long" / "manifest.json").stat().st_size
    return {"shards": shards, "samples": drawn, "seconds": round(seconds, 1), "manifest_bytes": manifest, "held": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults_scale.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--format", default="npz", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        return child(options.child, options.count, options.format)
    commit, dirty = commit_here()
    with tempfile.TemporaryDirectory() as name:
        results: dict[str, Any] = {
            "commit": commit, "dirty": dirty, "python": platform.python_version(), "torch": str(torch.__version__),
            "seed": options.seed,
        }  # fmt: skip
        results["killed"] = [
            kills(Path(name), times, sign, format, options.seed)
            for sign, format, times in (
                (signal.SIGKILL, "npz", options.kills), (signal.SIGKILL, "png", max(1, options.kills // 4)),
                (signal.SIGTERM, "npz", max(1, options.kills // 4)),
            )
        ]  # fmt: skip
        results["long_run"] = long_run(Path(name), options.shards)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    broken = sum(each[name] for each in results["killed"] for name in ("lost", "twice_or_left_over", "differ"))
    sys.exit(1 if broken or any(each["half_written"] for each in results["killed"]) else 0)


if __name__ == "__main__":
    main()
