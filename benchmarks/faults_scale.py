"""Break jobs of shards in every way that takes long, count what was lost, and write the counts.

    python benchmarks/faults_scale.py [--kills 20] [--shards 10000] [--out benchmarks/results/faults.json]

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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.results import commit_here

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.common.files import write_json
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


def start(sampler: Sampler, out: Path, count: int, format: str) -> int:
    """Fork a child that draws, and return its process once it is at its first range that is not there."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        assert os.read(reader, 5) == b"ready"
        os.close(reader)
        return process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command does: an exception, so that it tidies up
    draw = working.Drawer.draw

    def told(self: working.Drawer, first: int, end: int) -> Any:
        working.Drawer.draw = draw  # type: ignore[method-assign]
        os.write(writer, b"ready")
        return draw(self, first, end)

    working.Drawer.draw = told  # type: ignore[method-assign]
    code = 70
    try:
        sample_shards(sampler, out, count, format=format, **JOB)
    except SystemExit as stop:
        code = int(str(stop.code))
    finally:
        os._exit(code)


def kills(folder: Path, times: int, sign: signal.Signals, format: str, seed: int) -> dict[str, Any]:
    """Send a signal at random moments, and return what was found after each and at the end."""
    rng = random.Random(seed)
    count = 8 * 4000
    sampler = tiny_sampler(20)
    sampler.sample(8, batch_size=8)  # children find its loop built, so that kills come between shards and within
    found: dict[str, Any] = {
        "signal": sign.name, "format": format, "sent": 0, "exit_codes": {}, "half_written": 0, "shards_at_kills": [],
        "temporaries_left_by_kills": 0,
    }  # fmt: skip
    out, done = folder / f"{sign.name}-{format}", {}
    for _ in range(times):
        process = start(sampler, out, count, format)
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(process, sign)
        code = str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        found["sent"] += 1
        found["exit_codes"][code] = found["exit_codes"].get(code, 0) + 1
        now = contents(out) if out.exists() else {}
        shown = {name: digest for name, digest in now.items() if not name.startswith(".")}
        found["temporaries_left_by_kills"] += sum(name.startswith(".unfinished") for name in now)
        found["half_written"] += sum(shown.get(name) != digest for name, digest in done.items())
        found["shards_at_kills"].append(len({name.split("/")[0] for name in shown if name.startswith("shard-")}))
        done = shown
    return found | finish(sampler, folder, out, count, format)


def finish(sampler: Sampler, folder: Path, out: Path, count: int, format: str) -> dict[str, Any]:
    """Draw what was begun and three shards more, and compare that with what a run draws that nobody interrupts."""
    last = max((int(path.name.split("-")[1]) for path in out.glob("shard-*")), default=0) // 8
    whole = folder / f"whole-{format}"
    _first_shards(sampler, whole, count, format, last + 4)
    _first_shards(sampler, out, count, format, last + 4)
    want, got = contents(whole), contents(out)
    shutil.rmtree(whole)
    return {
        "shards_at_end": len({name.split("/")[0] for name in got if name.startswith("shard-")}),
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
        if index % (shards // 10) == shards // 20 or index == shards - 1:
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
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}  # the counts of other faults
    write_json(options.out, kept | {"scale": results})
    print(json.dumps(results, indent=2))
    broken = sum(each[name] for each in results["killed"] for name in ("lost", "twice_or_left_over", "differ"))
    sys.exit(1 if broken or any(each["half_written"] for each in results["killed"]) else 0)


if __name__ == "__main__":
    main()
