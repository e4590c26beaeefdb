"""A process that evaluates networks when it is told to, so that processes of several versions can take turns.

    python benchmarks/cpu/worker.py THREADS     commands on standard input, a reply to each on standard output, as JSON

    {"build": KEY, "arm": ..., "network": ..., "batch": N, "dtype": ..., "steps": N}   -> the arm's record
    {"run": KEY, "seconds": S}                                                         -> {"seconds": of a step}

The arm "loop" is `Sampler.sample`, by no more than what versions of fastddpm have in common: another checkout on
PYTHONPATH runs it as well. Other arms are those of `cpu.step`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Root mean squares of the difference, of values in [-1, 1], from a loop by torch's own ops in the same dtype. Rounding
# makes a hundredth of that in float32.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}

Run = Callable[[], object]


def loop(network: str, configuration: dict[str, Any] | None, batch: int, dtype: str, steps: int) -> tuple[Run, float]:
    """Return a loop of `steps` steps, and the rms of its difference from one by torch's own ops.

    Args:
        network: "digits" for the bundled model.
        configuration: of the U-Net, else, whose weights are of seed 0.
        batch: how many samples it draws at once.
        dtype: of the network.
        steps: of the loop.
    """
    from fastddpm import NoiseSchedule, Sampler, UNet, load_pretrained

    own: dict[str, Any] = {"num_inference_steps": steps, "dtype": getattr(torch, dtype)}
    arguments: dict[str, Any] = {"batch_size": batch}

    def make(backend: str) -> Sampler:
        if network == "digits":
            return load_pretrained().sampler(backend=backend, **own)
        torch.manual_seed(0)
        return Sampler(UNet(**(configuration or {})).eval(), NoiseSchedule.linear(1000), backend=backend, **own)

    if network == "digits":
        arguments["class_labels"] = [k % 10 for k in range(batch)]
    sampler, plain = make("auto"), make("eager")
    images, expected = (s.sample(batch, **arguments).double() for s in (sampler, plain))
    return lambda: sampler.sample(batch, **arguments), float((images - expected).square().mean().sqrt())


def build(command: dict[str, Any]) -> tuple[dict[str, Any], Run | None, int]:
    """Return the record of an arm, what is timed, and the steps of a call."""
    record = {name: command[name] for name in ("network", "batch", "arm", "dtype")}
    network, batch, dtype, steps = command["network"], command["batch"], command["dtype"], command["steps"]
    if command["arm"] == "loop":
        run, rms = loop(network, command["configuration"], batch, dtype, steps)
        record |= {"error": {"rms": rms, "bound_rms": BOUNDS[dtype]}, "given": f"{steps}-step loops", "status": "ok"}
        if not rms <= BOUNDS[dtype]:
            reason = f"is wrong: error {rms:.1e}, at most {BOUNDS[dtype]:.1e}"
            return record | {"status": "wrong", "reason": reason}, None, steps
        return record, run, steps
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from networks import make_problem

    from cpu.step import ARMS, prepare, results

    problem = make_problem(network, torch.device("cpu"))
    call = prepare(ARMS[command["arm"]], record, problem, results(problem, batch, [dtype])[dtype])
    return record, call, 1


def seconds_of(run: Run, seconds: float) -> float:
    """Return the seconds of a call, called again and again for `seconds`, after one that is not counted."""
    run()
    start = time.perf_counter()
    calls = 0
    while (passed := time.perf_counter() - start) < seconds or not calls:
        run()
        calls += 1
    return passed / calls


@torch.no_grad()
def main() -> None:
    """Serve commands until standard input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what libraries print is no reply
        ready: dict[str, tuple[Run, int]] = {}
        for line in sys.stdin:
            command = json.loads(line)
            if "build" in command:
                try:
                    reply, run, steps = build(command)
                    if run is not None:
                        ready[command["build"]] = run, steps
                except Exception as error:  # whatever an arm does, the others go on
                    reply = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
            else:
                run, steps = ready[command["run"]]
                reply = {"seconds": seconds_of(run, command["seconds"]) / steps}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
