"""Section `ops`: every op right first, then its share of the bandwidth of a copy, beside torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels.testing import assert_close, poisoned_memory

from fastddpm.perf.profiling.timing import capture, first_lines, release
from gpu.arms import Arm, Group, Unavailable
from gpu.machine import copy_bandwidth
from gpu.op_cases import Case, Tensors, all_cases
from gpu.results import Record, Section
from gpu.timing import split_time

COMPILE_S = 12.0
# Bytes below which a call is over before a chip has its memory busy: its share of a copy says little.
LARGE = 32 * 2**20


def run(section: Section, device: torch.device, small: bool) -> None:
    """Measures every case; a case whose result is wrong is recorded as failed and not timed."""
    machine = section.results.sections.get("machine", {})
    copy = machine.get("copy_gb_s") or copy_bandwidth(device, small)
    matmul = (machine.get("matmul_tflops") or {}).get("fp16")
    cache = machine.get("l2_bytes") or (0 if device.type == "cpu" else 64 * 2**20)
    section.set(copy_gb_s=copy, large_bytes=LARGE)
    pending = all_cases(device, small)
    for index, make_case in enumerate(pending):
        name = f"case {index}"
        try:
            case = make_case()
            name = f"{case.op} {case.name}"
            if section.has(name):
                continue
            left = split_time(section.left(), {str(i): 1.0 for i in range(index, len(pending))})[str(index)]
            seconds = left + (COMPILE_S if case.compiled and not small else 0)
            _run_case(section, case, name, device, min(seconds, section.left()), copy, matmul, cache, small)
        except Exception as error:  # a case that cannot be made is one record, not the end of the section
            section.add({"group": name, "arm": "triton", "status": "failed", "error": first_lines(error)})
            section.close_group(name)
        release(device)
    section.close()


def _run_case(
    section: Section,
    case: Case,
    name: str,
    device: torch.device,
    seconds: float,
    copy: float,
    matmul: float | None,
    cache: int,
    small: bool,
) -> None:
    torch.manual_seed(0)
    enough = seconds > 1
    wrong = check(case, device) if enough else None
    # All inputs together are several times the cache, so that no call finds its own there.
    sets = min(max(2, math.ceil(4 * cache / case.bytes)), 64)
    calls = sets * max(1, math.ceil(20 / sets))
    if small:
        sets = calls = 2
    inputs: list[Tensors] = [case.make() for _ in range(sets)] if enough else []

    def derive(record: Record, median: float) -> None:
        rate = case.bytes / median / 1e9
        record |= {"gb_per_s": rate, "percent_of_copy": 100 * rate / copy, "bytes": case.bytes}
        record["large"] = case.bytes >= LARGE
        if case.flops:
            record["tflops"] = case.flops / median / 1e12
            if matmul:
                floor = max(case.bytes / copy / 1e9, case.flops / matmul / 1e12)
                record["percent_of_floor"] = 100 * floor / median

    def arm(label: str, call: Callable[[Tensors], Any], build_s: float = 1.0) -> Arm:
        return Arm(
            label,
            lambda: _looped(call, inputs, calls, device),
            steps=calls,
            dtype=str(case.dtype).removeprefix("torch."),
            settings={"inputs": sets, "calls": calls, "timed": "graph" if device.type == "cuda" else "loop"},
            build_s=build_s if enough else 1.0,
            unchecked=wrong if label == "triton" else None,
        )

    def triton(tensors: Tensors) -> Any:
        if device.type != "cuda":
            raise Unavailable("triton kernels are timed on a GPU only")
        return case.run(tensors, "triton")

    arms = [arm("triton", triton), arm("eager", case.eager), _copy_arm(case, sets, calls, device)]
    if case.compiled:
        arms.append(_compiled_arm(arm, case, small))
    fields, most = {"what": case.op, "case": case.name}, 3 if small else 25
    Group(section, name, device, seconds, fields=fields, derive=derive, most=most).run(arms)


def _looped(
    call: Callable[[Tensors], Any], inputs: list[Tensors], calls: int, device: torch.device
) -> Callable[[], None]:
    def one(index: int) -> Callable[[], Any]:
        return lambda: call(inputs[index % len(inputs)])

    with torch.no_grad():
        replay = capture([one(index) for index in range(calls)], device)

    def run() -> None:
        with torch.no_grad():
            replay()

    return run


def _compiled_arm(arm: Callable[..., Arm], case: Case, small: bool) -> Arm:
    def call(tensors: Tensors) -> Any:
        if small:
            raise Unavailable("left out of a small run")
        return compiled(tensors)

    if not small:
        torch._dynamo.reset()
        compiled = torch.compile(case.eager, fullgraph=True, dynamic=False)
    return arm("torch.compile", call, 1.0 if small else COMPILE_S)


def _copy_arm(case: Case, sets: int, calls: int, device: torch.device) -> Arm:
    """A copy of as many bytes, for what a transfer of this size can reach at all."""

    def build() -> Callable[[], None]:
        size = max(case.bytes // 2, 1)
        pairs: list[Tensors] = []
        for _ in range(sets):
            source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
            pairs.append({"source": source, "target": torch.empty_like(source)})
        return _looped(lambda tensors: tensors["target"].copy_(tensors["source"]), pairs, calls, device)

    return Arm("copy of as many bytes", build, steps=calls, settings={"inputs": sets, "calls": calls}, build_s=1.0)


def check(case: Case, device: torch.device) -> str | None:
    """What is wrong with the op's result on fresh random tensors, or None. Outputs are poisoned before.

    All of it is looked at for what was not written, and some samples, the first and the last among them, compared.
    """
    backend = "triton" if device.type == "cuda" else "eager"
    tensors = case.make()
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(3)]
    try:
        with torch.no_grad(), poisoned_memory():
            got = case.run(copies[0], backend)
            expected = case.truth(copies[1])
            eager = case.run(copies[2], "eager")
        for index, (ours, truth, theirs) in enumerate(zip(got, expected, eager, strict=True)):
            assert bool(torch.isfinite(ours).all()), f"result {index} is not finite everywhere"
            rows = _some(ours)
            assert_close(ours[rows], truth[rows], eager=theirs[rows], name=f"{case.op}, result {index}")
    except AssertionError as error:
        return f"wrong: {first_lines(str(error), 1)}"
    return None


def _some(result: torch.Tensor, elements: int = 2**22) -> list[int]:
    """Samples to compare, spread evenly: about `elements` in all, and two at least."""
    count = len(result)
    wanted = max(2, min(count, elements // max(result[0].numel(), 1)))
    return sorted({round(index * (count - 1) / (wanted - 1)) for index in range(wanted)})
