"""Draw a profile: the roofline of every layer, the bandwidth of layers that only move memory, the throughput.

It needs matplotlib, and imports it only to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.common.files import atomic_write
from fastddpm.perf.profiling import causes
from fastddpm.perf.profiling.ceilings import SHORT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker.
STYLES = {
    "conv": ("#0072B2", "o"),
    "pointwise": ("#D55E00", "s"),
    "attention": ("#009E73", "^"),
    "norm": ("#CC79A7", "D"),
    "residual": ("#E69F00", "v"),
    "time": ("#56B4E9", "P"),
    "other": ("#666666", "X"),
}
_GREY = "#555555"
_INSTALL = 'plots need matplotlib: pip install "fastddpm[profile]"'

Record = dict[str, Any]


def check_plot(path: Path, name: str = "path") -> None:
    """Raise ValueError unless `path` has the suffix of a plot and matplotlib is installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} is {path}, its suffix must be one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"{name} is {path}, but {_INSTALL}") from None


def save_profile(path: Path, content: Record) -> None:
    """Draw a result of `model.profile` into a .png or .svg.

    Raises:
        ValueError: no batch size was measured.
    """
    measured = [record for record in content["batches"] if record["status"] == "ok"]
    if not measured:
        raise ValueError("there is nothing to draw: no batch size was measured")
    last = measured[-1]
    figure = new_figure(3, 5.0)
    first, second, third = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 1.0))
    roofs = causes.ceilings_of(content["ceilings"], SHORT[content["precision"]])
    cached = content["ceilings"].get("copy_cached_gb_s", {}).get("best")
    if roofs is not None and last["layers"]:
        draw_roofline(first, last["layers"], roofs, cached)
        draw_bandwidth(second, last["layers"], roofs, cached)
        first.set_title(f"layers that multiply, batch {last['batch']}", loc="left", fontsize=10)
        second.set_title(f"layers that do not, batch {last['batch']}", loc="left", fontsize=10)
    else:
        for axes in (first, second):
            axes.text(0.5, 0.5, "no layers or no ceilings\nwere measured", ha="center", va="center", color=_GREY)
            axes.set_axis_off()
    series = {content["precision"]: [(r["batch"], r["us_per_step"]) for r in measured]}
    bound = [(r["batch"], r["floor"]["network_us"]) for r in measured if r.get("floor")]
    draw_throughput(third, series, content["steps"], bound)
    third.set_title(f"throughput, {content['steps']} steps", loc="left", fontsize=10)
    model = content.get("model") or content["network"]["class"]
    figure.suptitle(f"{model} on {content['device']['name']}, {content['precision']}", x=0.01, ha="left", fontsize=12)
    save(path, figure)


def draw_roofline(axes: Axes, layers: Sequence[Record], roofs: causes.Ceilings, cached_gb_s: float | None) -> None:
    """Draw operations per second over operations per byte; the area of a layer's point shows its share of the time."""
    points = [layer for layer in layers if layer["flops"]]
    if not points:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return
    intensity = [layer["flops"] / layer["bytes"] for layer in points]
    ridge = roofs.flops / roofs.copy
    low, high = min(*intensity, ridge) / 3, max(*intensity, ridge) * 3
    scale, unit = (1e12, "TFLOP/s") if roofs.flops >= 1e12 else (1e9, "GFLOP/s")
    axes.plot([low, ridge, high], [low * roofs.copy / scale, roofs.flops / scale, roofs.flops / scale], color="black")
    label = f"products {roofs.flops / scale:.3g} {unit}"
    axes.annotate(label, (high, roofs.flops / scale), (-2, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.annotate(
        f"copy {roofs.copy / 1e9:.3g} GB/s", (low, low * roofs.copy / scale), (6, -2), textcoords="offset points",
        va="top", fontsize=8,
    )  # fmt: skip
    if cached_gb_s and cached_gb_s * 1e9 > roofs.copy:
        bend = roofs.flops / (cached_gb_s * 1e9)
        ends = [min(low, bend), bend]
        axes.plot(ends, [end * cached_gb_s * 1e9 / scale for end in ends], "--", color=_GREY, linewidth=1)
    _scatter(axes, points, intensity, [layer["flops"] / causes.time_of(layer) * 1e6 / scale for layer in points])
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel=unit)
    _finish(axes)


def draw_bandwidth(axes: Axes, layers: Sequence[Record], roofs: causes.Ceilings, cached_gb_s: float | None) -> None:
    """Draw bytes per second over bytes of the layers that neither convolve nor multiply matrices."""
    points = [layer for layer in layers if not layer["flops"] and layer["bytes"]]
    if not points:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return
    axes.axhline(roofs.copy / 1e9, color="black")
    axes.annotate(
        f"copy {roofs.copy / 1e9:.3g} GB/s", (0.98, roofs.copy / 1e9), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    if cached_gb_s:
        axes.axhline(cached_gb_s, linestyle="--", color=_GREY, linewidth=1)
        axes.annotate(
            f"copy in a cache {cached_gb_s:.3g} GB/s", (0.98, cached_gb_s), (0, 4), color=_GREY, ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    sizes = [layer["bytes"] / 1e6 for layer in points]
    _scatter(axes, points, sizes, [layer["bytes"] / causes.time_of(layer) / 1e3 for layer in points])
    axes.set(xscale="log", yscale="log", xlabel="MB read and written", ylabel="GB/s")
    _finish(axes)


def draw_throughput(
    axes: Axes,
    series: dict[str, list[tuple[int, Record]]],
    steps: int,
    bound: Sequence[tuple[int, float]] = (),
) -> None:
    """Draw images per second over the batch size: medians, with bars from the 20 % to the 80 % quantile.

    Args:
        axes: to draw on.
        series: {name: [(batch, microseconds per step as `timing.spread`)]}.
        steps: of an image.
        bound: [(batch, microseconds per step at the ceilings)].
    """
    from matplotlib.ticker import LogLocator

    def rate(batch: int, us: float) -> float:
        return batch / (us / 1e6 * steps)

    colours = [colour for colour, _ in STYLES.values()]
    batches = sorted({batch for points in series.values() for batch, _ in points})
    for index, (name, points) in enumerate(series.items()):
        middle = [rate(batch, us["median"]) for batch, us in points]
        low = [m - rate(b, us["p80"]) for m, (b, us) in zip(middle, points, strict=True)]
        high = [rate(b, us["p20"]) - m for m, (b, us) in zip(middle, points, strict=True)]
        axes.errorbar(
            [batch for batch, _ in points], middle, yerr=[low, high], marker="o", markersize=4, capsize=3,
            color=colours[index % len(colours)], label=name,
        )  # fmt: skip
    if bound:
        at = [batch for batch, _ in bound]
        axes.plot(at, [rate(b, us) for b, us in bound], "--", color="black", linewidth=1, label="at the ceilings")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    _finish(axes)


def save(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all; the same figure gives the same SVG."""
    import matplotlib

    def write(temporary: Path) -> None:
        metadata: Any = {"Date": None} if path.suffix.lower() == ".svg" else None
        with matplotlib.rc_context({"svg.hashsalt": "fastddpm"}):
            figure.savefig(temporary, dpi=130, metadata=metadata)

    atomic_write(path, write)


def new_figure(panels: int, width: float) -> Figure:
    """Make a figure without pyplot, which would keep the figure and may need a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width * panels, 4.6), layout="constrained")


def _scatter(axes: Axes, layers: Sequence[Record], xs: Sequence[float], ys: Sequence[float]) -> None:
    total = sum(causes.time_of(layer) for layer in layers) or 1.0
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        chosen = [k for k, layer in enumerate(layers) if layer["kind"] == kind]
        colour, marker = STYLES.get(kind, STYLES["other"])
        areas = [16 + 1200 * causes.time_of(layers[k]) / total for k in chosen]
        axes.scatter(
            [xs[k] for k in chosen], [ys[k] for k in chosen], s=areas, color=colour, marker=marker, alpha=0.65,
            edgecolors="white", linewidths=0.5, label=kind,
        )  # fmt: skip


def _finish(axes: Axes) -> None:
    if axes.get_xscale() == "log" and axes.get_xlabel() != "batch size":
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(lambda value, _: "")
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize=8, frameon=False, loc="best")
    for handle in legend.legend_handles:
        if (set_sizes := getattr(handle, "set_sizes", None)) is not None:
            set_sizes([36])
