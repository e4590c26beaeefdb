"""What `cpu_check.py` measured, as Markdown: `report.py` puts it into the README and docs/speed.md."""

from __future__ import annotations

from typing import Any

from fastddpm.perf.profiling.compare import LEAST_SAMPLES

CALLS = {
    "cifar10": "diffusers' `DDPMPipeline`, google/ddpm-cifar10-32",
    "lucidrains": "denoising_diffusion_pytorch's `GaussianDiffusion`, default `Unet`, 32x32",
}
NETWORKS = {"cifar10": "google/ddpm-cifar10-32", "digits": "the bundled digits"}
INSTRUCTIONS = {"avx2": "AVX2", "avx512": "AVX-512 without bfloat16"}
OURS = "fastddpm"

Record = dict[str, Any]


def of(content: Record) -> str:
    """Return all tables of a results file, empty lines between them."""
    return "\n\n".join(filter(None, (calls(content), _step(content), _isa(content), _crowd(content), _start(content))))


def figure(value: float) -> str:
    """Return a time with one digit behind the point below 100, two below 10."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def calls(content: Record, *, short: bool = False) -> str:
    """Return the table of one CPU's whole calls, originals against accelerated ones; "" if its file has none."""
    originals = {(r["network"], r["batch"]): r["median_s"] for r in content["records"] if r["arm"] == "original"}
    rows = []
    for record in content["records"]:
        if record["arm"] == "original":
            continue
        original, images = originals[record["network"], record["batch"]], record["images"]
        differ, more = (images[name] / images["pixels"] for name in ("pixels_differ", "pixels_differ_by_more_than_1"))
        band = "" if short else f" ({record['times_as_fast_p20']:.2f} to {record['times_as_fast_p80']:.2f})"
        row = (
            f"| {CALLS.get(record['network'], record['network'])} | {record['batch']} | {record['arm']} "
            f"| {figure(1e3 * original / content['steps'])} | {figure(1e3 * record['median_s'] / content['steps'])} "
            f"| **{record['times_as_fast']:.2f}**{band} |"
        )
        rows.append(row if short else f"{row} {100 * differ:.2g} % ({100 * more:.2g} %) |")
    if not rows:
        return ""
    more_columns = "" if short else " 8-bit pixels that differ (by more than 1) |"
    lines = [
        f"{_name(content)}; {content['steps']}-step calls with all that is in them:",
        "",
        "| original, in float32 | batch | accelerated | original, ms per step | accelerated, ms "
        f"| times as fast{'' if short else ' (20 % to 80 %)'} |{more_columns}",
        "|---|---|---|---|---|---|" + ("" if short else "---|"),
        *rows,
    ]
    return "\n".join(lines)


def _name(content: Record) -> str:
    native = "" if content.get("native") == "yes" else f", without native code: {content.get('native')}"
    commit = content["commit"] + (" with changes" if content.get("dirty") else "")
    return (
        f"**{content['cpu']}**, {content['threads']} threads, torch {content['torch']}{native}, commit {commit}, "
        f"{content['written'][:10]}"
    )


def _step(content: Record) -> str:
    """Return a table of each network's evaluations, and what the libraries were given; "" if there are none."""
    step = content.get("step", {})
    if step.get("rounds", 0) < LEAST_SAMPLES:
        return ""
    networks = dict.fromkeys(record["network"] for record in step["records"])
    versions = ", ".join(f"{name} {version}" for name, version in step["versions"].items())
    parts = []
    for network in networks:
        head = (
            f"{_name(content)}; one evaluation of the U-Net of {_titled(network)} in diffusers as it "
            f"comes, and in all libraries at their best ({versions}), same weights, {step['rounds']} rounds in turn:"
        )
        records = [record for record in step["records"] if record["network"] == network]
        parts.append(_evaluations(records, head, about=network == next(iter(networks))))
    return "\n\n".join(filter(None, parts))


def _isa(content: Record) -> str:
    """Return a table for each set of instructions that all arms were held to."""
    parts = []
    for name, section in content.get("isa", {}).items():
        title = INSTRUCTIONS.get(name, name)
        if section["status"] != "ok":
            parts.append(f"Not measured with {title}: {_sentence(section['reason'])}.")
        elif section["rounds"] >= LEAST_SAMPLES:
            variables = ", ".join(f"{key}={value}" for key, value in section["variables"].items())
            head = (
                f"{_name(content)}; the same held to {title} (the native library compiled with `{section['cxx']}`, "
                f"torch under `{variables}`), {section['rounds']} rounds in turn:"
            )
            parts.append(_evaluations(section["records"], head, about=False))
    return "\n\n".join(filter(None, parts))


def _evaluations(records: list[Record], head: str, *, about: bool) -> str:
    """Return the table of one network; with `about`, also what the columns mean and what the arms were given."""
    rows: list[str] = []
    given: dict[str, dict[str, list[tuple[str, int]]]] = {}  # {arm: {what it was given: [(dtype, batch)]}}
    left: dict[str, list[int]] = {}
    floors = any("floor" in record for record in records)  # files from before December 2026 have none
    for record in records:
        arm, dtype, batch = record["arm"], record["dtype"], record["batch"]
        if record["status"] != "ok":
            left.setdefault(f"{arm} in {dtype}: {_sentence(record['reason'])}", []).append(batch)
            continue
        given.setdefault(arm, {}).setdefault(record["given"], []).append((dtype, batch))
        ratio, compile_s = record["times_as_fast"], record["compile_s"]
        floor = f" {_floor(record, record['seconds'])} |" if floors else ""
        rows.append(
            f"| {arm} | {dtype} | {batch} | {figure(1e3 * record['seconds']['median'])} |{floor} "
            f"{_spread(ratio, bold=True)} | {record['error']['rms']:.1e} "
            f"| {'-' if compile_s is None else f'{compile_s:.1f}'} |"
        )
    if not rows:
        return ""
    lines = [
        head,
        "",
        f"| arm | precision | batch | ms per evaluation |{' floor, ms |' if floors else ''} times as fast as diffusers "
        "in float32 (20 % to 80 %) | relative error (rms) against float64 | seconds of compiling |",
        "|---|---|---|---|---|---|---|" + ("---|" if floors else ""),
        *rows,
    ]
    if about:
        least = (
            "The floor is the time of the products of the layers' definitions at the best rate measured here, or of "
            "reading the weights once, whichever is longer; Winograd's convolutions need fewer products. "
        )
        lines += [
            "",
            f"{least if floors else ''}Compiling is converting, compiling and autotuning to the first result; of "
            "fastddpm, folding and packing the weights. What the arms were given:",
            "",
            *(f"- {arm}: {_given(texts)}" for arm, texts in given.items()),
        ]
    if left:
        counts = [f"{text} (batch {_and(batches)})" for text, batches in left.items()]
        lines += ["", f"Not measured: {'; '.join(counts)}."]
    return "\n".join(lines)


def _crowd(content: Record) -> str:
    """Return the table of steps on an idle and on a busy machine; "" if there are none."""
    crowd = content.get("crowd", {})
    if crowd.get("rounds", 0) < LEAST_SAMPLES:
        return ""
    rows, left = [], []
    for case in dict.fromkeys((r["network"], r["batch"], r["dtype"]) for r in crowd["records"]):
        records = [r for r in crowd["records"] if (r["network"], r["batch"], r["dtype"]) == case]
        ours = next((r.get("times_as_fast", {}) for r in records if r["arm"] == OURS), {})
        for record in records:
            network, batch, dtype = case
            if record["status"] != "ok":
                left.append(
                    f"{record['arm']} of {_titled(network)}, batch {batch}, {dtype}: {_sentence(record['reason'])}"
                )
                continue
            times = [ours.get(condition, {}).get(record["arm"]) for condition in ("idle", "busy", "two")]
            rows.append(
                f"| {_titled(network)} | {batch} | {dtype} | {_arm(record['arm'])} "
                f"| {figure(1e3 * record['idle']['median'])} | {_floor(record, record['idle'])} "
                f"| {_spread(record['busy_over_idle'])} | {_spread(record['two_over_idle'])} "
                f"| {' / '.join('-' if ratio is None else format(ratio['median'], '.2f') for ratio in times)} |"
            )
    if not rows:
        return ""
    lines = [
        f"{_name(content)}; a step of `Sampler.sample` (of OpenVINO an evaluation), {crowd['rounds']} rounds in turn, "
        "idle, beside a busy loop, and of two processes at once, with the 20 % to 80 % quantiles of the rounds:",
        "",
        "| network | batch | precision | arm | idle, ms per step | floor, ms | times slower beside a busy loop "
        "| times slower with two at once | times as fast is fastddpm, idle / busy / two |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join([*lines, *(["", f"Not measured: {'; '.join(left)}."] if left else [])])


def _start(content: Record) -> str:
    """Return a sentence on `fastddpm sample` from the start of its process; "" if it was not measured."""
    start = content.get("start", {})
    seconds = {r["arm"]: r["seconds"]["median"] for r in start.get("records", []) if r["status"] == "ok"}
    if OURS not in seconds:
        return ""
    text = (
        f"{_name(content)}; `fastddpm sample -n {start['samples']} --steps {start['steps']}` of the bundled digits, "
        f"from the start of the process to its end: {seconds[OURS]:.1f} s"
    )
    ratios = next(r["times_as_fast"] for r in start["records"] if r["arm"] == OURS)
    parts = [
        f"{_arm(arm)} {seconds[arm]:.1f} s (**{q['median']:.2f}** times)" for arm, q in ratios.items() if arm in seconds
    ]
    return f"{text}{''.join(f'; {part}' for part in parts)}."


def _titled(network: str) -> str:
    return NETWORKS.get(network, network)


def _arm(name: str) -> str:
    """Return how an arm is shown: other versions by their commit."""
    return name if name in (OURS, "openvino", "diffusers", "torch.compile") else f"fastddpm at commit {name}"


def _floor(record: Record, measured: Record) -> str:
    """Return a floor in milliseconds, and what share of the measured time it is."""
    seconds = record["floor"]["seconds"]
    return f"{figure(1e3 * seconds)} ({100 * seconds / measured['median']:.0f} %)"


def _spread(ratio: Record | None, *, bold: bool = False) -> str:
    if not ratio:
        return "-"
    mark = "**" if bold else ""
    return f"{mark}{ratio['median']:.2f}{mark} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _given(texts: dict[str, list[tuple[str, int]]]) -> str:
    """Say what an arm was given, once where it is the same for all precisions and batch sizes."""
    every: dict[str, int] = {}
    for dtype, _ in (case for cases in texts.values() for case in cases):
        every[dtype] = every.get(dtype, 0) + 1
    parts = []
    for text, cases in texts.items():
        own: dict[str, list[int]] = {}
        for dtype, batch in cases:
            own.setdefault(dtype, []).append(batch)
        where = [f"in {d}" + f" at batch {_and(b)}" * (len(b) < every[d]) for d, b in own.items()]
        parts.append(text if len(texts) == 1 else f"{_and(where)} {text}")
    return "; ".join(parts)


def _and(values: list[Any]) -> str:
    return " and ".join(map(str, values))


def _sentence(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
