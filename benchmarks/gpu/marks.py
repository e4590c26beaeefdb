"""The marks that fastddpm is held to on a GPU, judged from a results file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu.results import Record

MAIN = "fastddpm fp16"


class Mark(NamedTuple):
    """One mark.

    Attributes:
        what: is asked for.
        wanted: the bound, in words.
        found: the figure, None if it was not measured.
        passed: None if it was not measured.
        short: by how much it was missed, in words; "" if it was not.
        where: what the figure was read from, or why there is none.
    """

    what: str
    wanted: str
    found: float | None
    passed: bool | None
    short: str
    where: str


def judge(content: dict[str, Any]) -> list[Mark]:
    """All marks, in one order; those that cannot be judged from `content` say why."""
    return [
        *_against_pipeline(content),
        *_against_compile(content),
        _at_most("CIFAR-10 batch 1, us per step", 400, *_step_time(content, 1)),
        _at_least("CIFAR-10 batch 256, share of the compute floor, %", 50, *_share_of_floor(content, 256)),
        *(_at_most(f"idle share at batch {n}, %", 2, *_idle(content, n)) for n in (1, 64, 256)),
        _at_least("reverse_step, % of copy", 85, *_worst_op(content, "reverse_step")),
        _at_least("q_sample, % of copy", 85, *_worst_op(content, "q_sample")),
        _at_least("group_norm_silu, % of copy", 75, *_worst_op(content, "group_norm_silu")),
    ]


def records(content: dict[str, Any], section: str, **fields: Any) -> list[Record]:
    """The records of a section whose fields have these values."""
    found = content.get("sections", {}).get(section, {}).get("records", [])
    return [r for r in found if all(r.get(name) == value for name, value in fields.items())]


def median(content: dict[str, Any], section: str, group: str, arm: str) -> float | None:
    """Median microseconds per step of an arm, None if it was not measured."""
    for record in records(content, section, group=group, arm=arm, status="ok"):
        return float(record["us_per_step"]["median"])
    return None


def why_no(content: dict[str, Any], section: str, group: str, arm: str) -> str:
    """Why an arm has no figure."""
    for record in records(content, section, group=group, arm=arm):
        return f"{arm}: {record['status']}: {record.get('error') or record.get('reason') or ''}".split("\n")[0]
    status = content.get("sections", {}).get(section, {}).get("status", "not run")
    return f"{section} ({status}) holds no {arm!r}"


def ratios(content: dict[str, Any], section: str, kind: str, other: str) -> Iterator[tuple[int, float]]:
    """(batch, time of `other` over ours) for all groups of a kind that have both."""
    groups = dict.fromkeys(r["group"] for r in records(content, section, what=kind))
    for group in groups:
        ours, theirs = (median(content, section, group, arm) for arm in (MAIN, other))
        if ours and theirs:
            yield int(group.split()[-1]), theirs / ours


def _against_pipeline(content: dict[str, Any]) -> Iterator[Mark]:
    found = dict(ratios(content, "cifar10", "loop", "DDPMPipeline"))
    for batch, wanted in ((1, 10), (8, 10), (64, 5), (256, 5), (1024, 5)):
        name = f"CIFAR-10 batch {batch}, times as fast as DDPMPipeline"
        group = f"loop batch {batch}"
        ours = median(content, "cifar10", group, MAIN)
        why = why_no(content, "cifar10", group, MAIN if ours is None else "DDPMPipeline")
        yield _at_least(name, wanted, found.get(batch), group if batch in found else why)


def _against_compile(content: dict[str, Any]) -> Iterator[Mark]:
    values: list[tuple[str, float]] = []
    for section in ("cifar10", "celeba256"):
        values += [(f"{section} batch {n}", r) for n, r in ratios(content, section, "compiled", "torch.compile fp16")]
    name = "times as fast as the best torch.compile"
    if not values:
        why = why_no(content, "cifar10", "compiled batch 8", "torch.compile fp16")
        yield _at_least(f"least {name}", 1, None, why)
        yield _at_least(f"median {name}", 1.3, None, why)
        return
    values.sort(key=lambda value: value[1])
    middle = (values[(len(values) - 1) // 2][1] + values[len(values) // 2][1]) / 2
    where = ", ".join(where for where, _ in values)
    yield _at_least(f"least {name}", 1, values[0][1], values[0][0])
    yield _at_least(f"median {name}", 1.3, middle, where)


def _step_time(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    group = f"loop batch {batch}"
    value = median(content, "cifar10", group, MAIN)
    return value, group if value is not None else why_no(content, "cifar10", group, MAIN)


def _share_of_floor(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    us, why = _step_time(content, batch)
    sections = content.get("sections", {})
    tflops = (sections.get("machine", {}).get("matmul_tflops") or {}).get("fp16")
    flops = (sections.get("cifar10", {}).get("problem") or {}).get("flops_per_image_and_step")
    if us is None or not tflops or not flops:
        return None, why if us is None else "no matmul ceiling: section machine was not run"
    return 100 * flops * batch / tflops / 1e6 / us, f"at {tflops:.0f} TFLOP/s measured"


def _idle(content: dict[str, Any], batch: int) -> tuple[float | None, str]:
    for record in records(content, "profile", batch=batch, status="ok"):
        return 100 * float(record["idle_share"]), str(record["counted"])
    return None, why_no(content, "profile", f"batch {batch}", MAIN)


def _worst_op(content: dict[str, Any], op: str) -> tuple[float | None, str]:
    """The least share among the large shapes of an op; a wrong result is worth nothing."""
    found = records(content, "ops", what=op, arm="triton")
    wrong = [r for r in found if r["status"] == "failed"]
    if wrong:
        return 0.0, f"{wrong[0]['case']}: {wrong[0].get('error', '')}".split("\n")[0]
    large = [r for r in found if r["status"] == "ok" and r.get("large")]
    if not large:
        return None, why_no(content, "ops", next((r["group"] for r in found), op), "triton")
    worst = min(large, key=lambda r: r["percent_of_copy"])
    missing = sum(r["status"] == "not run" for r in found)
    more = f"; {missing} not run" if missing else ""
    return float(worst["percent_of_copy"]), f"worst of {len(large)} large shapes, {worst['case']}{more}"


def _at_least(what: str, wanted: float, found: float | None, where: str) -> Mark:
    short = "" if found is None or found >= wanted else f"{wanted - found:.3g} short"
    return Mark(what, f">= {wanted:g}", found, None if found is None else found >= wanted, short, where)


def _at_most(what: str, wanted: float, found: float | None, where: str) -> Mark:
    short = "" if found is None or found <= wanted else f"{found - wanted:.3g} over"
    return Mark(what, f"<= {wanted:g}", found, None if found is None else found <= wanted, short, where)
