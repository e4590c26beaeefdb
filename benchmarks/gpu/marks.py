"""The marks that fastddpm is held to on a GPU, judged from a results file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu.results import median, records

MAIN = "fused"
# The least share of the copies' rate, where a large shape is bound by memory. By the instructions that were counted
# (`results/aot.json`), a kernel that issues nine tenths of what an H200 can takes for its slowest large shape, fp16:
# 71 instructions of an element of 12 bytes in `reverse_step`, 42 of 6 in `q_sample` with a velocity, 20 of 4 in a norm.
OPS = {"reverse_step": 85, "q_sample": 80, "group_norm_silu": 75}


class Mark(NamedTuple):
    """One mark.

    Attributes:
        what: is asked for.
        wanted: the bound; found must be at least that, or at most if `most`.
        found: the figure, None if it was not measured.
        where: what the figure was read from, or why there is none.
    """

    what: str
    wanted: float
    found: float | None
    where: str
    most: bool = False

    @property
    def verdict(self) -> str:
        """Say "PASS", by how much it was missed, or "not measured"."""
        if self.found is None:
            return "not measured"
        short = self.found - self.wanted if self.most else self.wanted - self.found
        return "PASS" if short <= 0 else f"{short:.3g} {'over' if self.most else 'short'}"


def judge(content: dict[str, Any]) -> list[Mark]:
    """Return all marks, in one order; those that cannot be judged from `content` say why."""
    return [
        *_against_pipeline(content),
        *_against_compile(content),
        Mark("CIFAR-10 batch 1, us per step", 400, *_step_time(content, 1), most=True),
        Mark("CIFAR-10 batch 256, share of the compute floor, %", 50, *_share_of_floor(content, 256)),
        *(Mark(f"idle share at batch {n}, %", 2, *_idle(content, n), most=True) for n in (1, 64, 256)),
        *(Mark(f"{op}, % of copy", share, *_worst_op(content, op)) for op, share in OPS.items()),
    ]  # fmt: skip


def loop_group(network: str, batch: int) -> str:
    """Return the group of a loop in section `network`."""
    return f"loop {network} fp16 batch {batch}"


def why_no(content: dict[str, Any], section: str, group: str, arm: str) -> str:
    """Return why an arm has no figure."""
    for record in records(content, section, group=group, arm=arm):
        return f"{arm}: {record['status']}: {record.get('reason') or ''}".split("\n")[0]
    status = content.get("sections", {}).get(section, {}).get("status", "not run")
    return f"{section} ({status}) holds no {arm!r}"


def _against_pipeline(content: dict[str, Any]) -> Iterator[Mark]:
    for batch, wanted in ((1, 10), (8, 10), (64, 5), (256, 5), (1024, 5)):
        group = loop_group("cifar10", batch)
        ours, theirs = (median(content, "cifar10", group, arm) for arm in (MAIN, "DDPMPipeline"))
        missing = MAIN if ours is None else "DDPMPipeline"
        found = theirs / ours if ours and theirs else None
        where = group if found else why_no(content, "cifar10", group, missing)
        yield Mark(f"CIFAR-10 batch {batch}, times as fast as DDPMPipeline", wanted, found, where)


def _against_compile(content: dict[str, Any]) -> Iterator[Mark]:
    values: list[tuple[float, str]] = []
    for section in ("cifar10", "celeba256"):
        for record in records(content, section, arm="compiled", status="ok"):
            if record["group"].startswith("loop") and (ours := median(content, section, record["group"], MAIN)):
                values.append((record["us_per_step"]["median"] / ours, record["group"]))
    values.sort()
    middle = None if not values else (values[(len(values) - 1) // 2][0] + values[len(values) // 2][0]) / 2
    why = why_no(content, "cifar10", loop_group("cifar10", 8), "compiled")
    name, where = "times as fast as the best torch.compile", ", ".join(where for _, where in values) or why
    yield Mark(f"least {name}", 1, values[0][0] if values else None, where)
    yield Mark(f"median {name}", 1.3, middle, where)


def _step_time(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    group = loop_group("cifar10", batch)
    value = median(content, "cifar10", group, MAIN)
    return value, group if value is not None else why_no(content, "cifar10", group, MAIN)


def _share_of_floor(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    for record in records(content, "cifar10", group=loop_group("cifar10", batch), arm=MAIN, status="ok"):
        return float(record["percent_of_roof"]), f"at {record['matmul_tflops']:.0f} TFLOP/s measured"
    return None, why_no(content, "cifar10", loop_group("cifar10", batch), MAIN)


def _idle(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    for record in records(content, "profile", batch=batch, status="ok"):
        if record.get("idle_share") is not None:
            return 100 * float(record["idle_share"]), f"batch {batch}"
    return None, why_no(content, "profile", f"batch {batch}", MAIN)


def _worst_op(content: dict[str, Any], op: str) -> tuple[float | None, str]:
    """Return the least share among the large shapes of an op; a wrong result is worth nothing."""
    name = {"group_norm_silu": "forward"}.get(op, op)
    found = [r for r in records(content, "ops", arm=MAIN) if r["group"].startswith(name + " ")]
    if wrong := [r for r in found if r["status"] == "failed"]:
        return 0.0, f"{wrong[0]['group']}: {wrong[0].get('reason', '')}".split("\n")[0]
    large = [r for r in found if r["status"] == "ok" and r.get("large") and r.get("roof") == "copy"]
    if not large:
        return None, why_no(content, "ops", found[0]["group"] if found else op, MAIN)
    worst = min(large, key=lambda r: r["percent_of_roof"])
    return float(worst["percent_of_roof"]), f"worst of {len(large)} large shapes, {worst['group']}"
