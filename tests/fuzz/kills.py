"""Kill commands at random moments, and look at what they leave: python tests/fuzz/kills.py --kills 20.

A command runs in a process that is forked when everything is imported. Half of the kills, by SIGKILL, come at moments
drawn from a seed, the others just after a temporary file has appeared, so that they hit a write. Then nothing may be
half-written, and the same command must succeed and leave no temporary file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastddpm import NoiseSchedule, UNet, load_pretrained, save_pretrained
from fastddpm.cli import main
from fastddpm.cli.outputs import INCOMPLETE
from fastddpm.common.files import write_json

SEED = 0
SAMPLE = ["sample", "../model", "-n", "400", "--steps", "3", "--device", "cpu"]
TRAIN = [
    "train", "../data.npz", "--steps", "6", "--batch-size", "2", "--width", "8", "--device", "cpu", "-o", "run",
    "--set", "trainer.save_every=2", "--set", "trainer.num_workers=0", "--set", "trainer.tensorboard=false",
    "--set", "trainer.num_samples=1", "--set", "trainer.num_inference_steps=2",
]  # fmt: skip


def fork(run: Callable[[], object]) -> int:
    """Run in a child process, silently, and return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        with open("../log", "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = int(run() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(child: int, seconds: float) -> int | None:
    """Return a child's exit code once it ends; None if it still runs after that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def writes(child: int, folder: Path, files: int) -> bool:
    """Wait until so many temporary files of a child have been seen; return False if it ends before."""
    seen: set[str] = set()
    while len(seen) < files:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        seen.update(leftovers(folder))
    return True


def kill(child: int) -> bool:
    """Kill a child and its own; return whether it had not ended before."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# -- what there must and must not be ----------------------------------------------------------------------------------


def whole_picture(path: Path) -> None:
    with Image.open(path) as picture:
        for frame in range(getattr(picture, "n_frames", 1)):
            picture.seek(frame)
            picture.load()


def whole_arrays(path: Path) -> None:
    with np.load(path) as file:
        assert file["arr_0"].shape[0] == 400


def whole_folder(path: Path) -> None:
    pictures = sorted(path.glob("[0-9]*.png"))
    for picture in pictures:
        whole_picture(picture)
    assert len(pictures) == 400 or (path / INCOMPLETE).exists() or not list(path.iterdir())


def whole_run(path: Path) -> None:
    for model in path.glob("model*"):
        load_pretrained(model)
    for checkpoint in (path / "checkpoints").glob("step-*"):
        assert (checkpoint / "manifest.json").is_file()


def whole_table(path: Path) -> None:
    for table in path.rglob("*.json"):
        if not table.name.startswith("."):
            json.loads(table.read_text())


def sampled(name: str, whole: Callable[[Path], None], files: int = 1) -> dict[str, Any]:
    return {"run": lambda: main([*SAMPLE, "-o", name]), "made": name, "whole": whole, "files": files}


def trained() -> int:
    return main([*TRAIN, "--resume"])


def tuned() -> int:
    os.environ |= {"FASTDDPM_CACHE_DIR": str(Path("cache").absolute()), "FASTDDPM_TUNED": "1"}
    return main(["tune", "../model", "--batch", "1", "--device", "cpu", "--budget", "2"])


def built() -> int:
    os.environ["FASTDDPM_CACHE_DIR"] = str(Path("cache").absolute())
    from fastddpm_kernels.backend import why_not

    return int(why_not("native", "cpu") is not None)


# What runs, what it makes, what must hold of that after a kill, and how many temporary files of a run can be seen.
KINDS: dict[str, dict[str, Any]] = {
    "sample .png": sampled("a.png", whole_picture),
    "sample .npz": sampled("a.npz", whole_arrays),
    "sample .gif": sampled("a.gif", whole_picture),
    "sample folder": sampled("a", whole_folder, files=100),
    "train": {"run": trained, "made": "run", "whole": whole_run, "files": 8},
    "tune": {"run": tuned, "made": "cache", "whole": whole_table, "files": 1},
    "build": {"run": built, "made": "cache", "whole": lambda path: None, "files": 0},
}


def prepare(folder: Path) -> None:
    torch.manual_seed(SEED)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    save_pretrained(folder / "model", unet, NoiseSchedule.linear(10))
    pixels = np.random.default_rng(SEED).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", pixels)


def leftovers(folder: Path) -> list[str]:
    """Return temporary files and folders: hidden ones."""
    names = (name for _, folders, files in os.walk(folder) for name in (*folders, *files))
    return [name for name in names if name.startswith(".") and not name.startswith(".ninja")]


def killed(kind: str, kills: int, folder: Path) -> dict[str, Any]:
    """Kill a command so often, and count what was wrong."""
    what = KINDS[kind]
    place, chance = folder / "here", random.Random(SEED)
    counts = dict.fromkeys(
        ("kills", "while_writing", "left_temporaries", "half_written", "failed_next", "left_next", "ended_before"), 0
    )

    def clean() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)

    clean()
    start = time.monotonic()
    code = finished(fork(what["run"]), 600)
    assert code == 0, f"{kind} ends with {code} unharmed: {(folder / 'log').read_text()[-2000:]}"
    seconds = time.monotonic() - start
    while counts["kills"] < kills:
        clean()
        child = fork(what["run"])
        writing = counts["kills"] % 2 == 1 and what["files"] > 0
        if writing:
            if writes(child, place, chance.randint(1, what["files"])):
                time.sleep(chance.uniform(0, 0.002))
        else:
            time.sleep(chance.uniform(0.1, 1) * seconds)
        if not kill(child):
            counts["ended_before"] += 1
            seconds *= 1 if writing else 0.95  # the machine is less busy than it was
            continue
        counts["kills"] += 1
        counts["while_writing"] += writing
        counts["left_temporaries"] += bool(leftovers(place))
        made = place / what["made"]
        try:
            if made.exists():
                what["whole"](made)
        except Exception:
            traceback.print_exc()
            counts["half_written"] += 1
        if kind.startswith("sample") and made.exists() and (made.is_file() or not (made / INCOMPLETE).exists()):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        code = finished(fork(what["run"]), 600)
        counts["failed_next"] += code != 0
        if left := leftovers(place):
            print(f"{kind}: the next run left {left}", file=sys.stderr)
            counts["left_next"] += 1
    os.chdir(folder)
    return counts


def run(arguments: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder)
        for kind in arguments.only or KINDS:
            results[kind] = killed(kind, arguments.kills, folder)
            print(f"{kind}: {results[kind]}", flush=True)
            if arguments.json is not None:
                kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
                kept["kills"] = kept.get("kills", {}) | {kind: results[kind]}
                write_json(arguments.json, kept)
    wrong = sum(counts[name] for counts in results.values() for name in ("half_written", "failed_next", "left_next"))
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=KINDS)
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    sys.exit(run(parser.parse_args()))
