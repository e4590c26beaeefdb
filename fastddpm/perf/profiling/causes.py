"""Compute the least time of a step at the measured ceilings, and find what keeps the step from it.

An instruction's floor is the longer of two times: its operations at the ceiling of matrix products, and its bytes at
that of copies (Williams et al. 2009, the roofline model). The sum of these floors is the floor of the network as cut
into layers. A network in a single kernel would still do the operations and read the weights once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]

# The words for one layer of a kind, and for several.
WORDS = {
    "conv": ("convolution", "convolutions"),
    "norm": ("norm", "norms"),
    "pointwise": ("1x1 convolution or linear layer", "1x1 convolutions and linear layers"),
    "attention": ("attention", "attentions"),
    "residual": ("residual addition", "residual additions"),
    "time": ("look-up of the time embedding", "look-ups of the time embedding"),
    "other": ("other layer", "other layers"),
}


class Ceilings(NamedTuple):
    """The limits of a machine.

    Attributes:
        flops: operations per second of the best matrix product in the network's precision.
        copy: bytes per second of a large copy, read and written.
        node_us: microseconds of an empty kernel in a graph; 0 where there are no graphs.
    """

    flops: float
    copy: float
    node_us: float = 0.0


def ceilings_of(measured: Record, precision: str) -> Ceilings | None:
    """Return the ceilings for a precision ("fp32", ...) from `ceilings.measure`; None if one is missing."""
    product = measured.get("matmul_tflops", {}).get(precision, {}).get("best")
    copy = measured.get("copy_gb_s", {}).get("best")
    if not product or not copy:
        return None
    return Ceilings(product * 1e12, copy * 1e9, float(measured.get("latency", {}).get("graph_node_us", 0.0)))


def floor_us(layer: Record, ceilings: Ceilings) -> float:
    """Return the microseconds of a layer at the ceilings."""
    return max(layer["flops"] / ceilings.flops, layer["bytes"] / ceilings.copy) * 1e6


def bound_by(layer: Record, ceilings: Ceilings) -> str:
    """Return the bound of a layer at its floor: "compute" or "memory"; "latency" where launching takes longer."""
    if layer["kernels"] * ceilings.node_us > floor_us(layer, ceilings):
        return "latency"
    return "compute" if layer["flops"] / ceilings.flops >= layer["bytes"] / ceilings.copy else "memory"


def judge_layers(layers: list[Record], ceilings: Ceilings) -> None:
    """Add to every layer "floor_us", the "share" of the roof that it reaches, and its "bound".

    A share above 1 does not mean that the device exceeds its ceilings. Operands came from a cache, or the layer needs
    fewer operations than counted (a convolution by Winograd's algorithm).
    """
    for layer in layers:
        layer["floor_us"] = floor_us(layer, ceilings)
        layer["share"] = layer["floor_us"] / time_of(layer) if time_of(layer) > 0 else 0.0
        layer["bound"] = bound_by(layer, ceilings)


def time_of(layer: Record) -> float:
    """Return the microseconds of a layer: those of its kernels in a step if traced, else as timed on its own."""
    return float(layer.get("traced_us") or layer["us"]["median"])


def floors(layers: Sequence[Record], ceilings: Ceilings, weight_bytes: int, us: float) -> Record:
    """Return the floors of a step, and the share of each that it reaches.

    Args:
        layers: with "flops" and "bytes".
        ceilings: of the machine.
        weight_bytes: bytes of all weights in the network's precision.
        us: microseconds of a step as measured.

    Returns:
        "layers_us": the sum of the layers' floors; "compute_us", "weights_us": for the whole network in one piece, the
        time of its operations and of reading the weights once; "network_us": the longer of these two;
        "share_of_layers", "share_of_network": "layers_us" and "network_us" divided by `us`.
    """
    compute = sum(layer["flops"] for layer in layers) / ceilings.flops * 1e6
    weights = weight_bytes / ceilings.copy * 1e6
    of_layers, of_network = sum(floor_us(layer, ceilings) for layer in layers), max(compute, weights)
    return {
        "layers_us": of_layers,
        "compute_us": compute,
        "weights_us": weights,
        "network_us": of_network,
        "share_of_layers": of_layers / us,
        "share_of_network": of_network / us,
    }


def grouped(layers: Sequence[Record]) -> list[Record]:
    """Return sums over layers of one kind and size: {"kind", "size", "layers", "us", "floor_us", "flops", "bytes"}."""
    groups: dict[tuple[str, Any], Record] = {}
    for layer in layers:
        size = layer["size"]
        key = (layer["kind"], tuple(size) if size else None)
        group = groups.setdefault(
            key, {"kind": layer["kind"], "size": size, "layers": 0, "us": 0.0, "floor_us": 0.0, "flops": 0, "bytes": 0}
        )
        group["layers"] += 1
        group["us"] += time_of(layer)
        for name in ("floor_us", "flops", "bytes"):
            group[name] += layer[name]
    return list(groups.values())


def causes(
    layers: Sequence[Record],
    ceilings: Ceilings,
    us: float,
    network_us: float,
    layers_us: float | None = None,
    *,
    idle_share: float | None = None,
) -> list[Record]:
    """Split the time of a step above the sum of its layers' floors into causes, costliest first.

    Args:
        layers: judged by `judge_layers`.
        ceilings: of the machine.
        us: microseconds of a step as measured.
        network_us: microseconds of the network alone.
        layers_us: the mean time of all layers in one evaluation, where they were timed so. Interruptions make it longer
            than the sum of the layers' medians.
        idle_share: the share of a step in which a GPU runs no kernel, where traced.

    Returns:
        [{"what": one sentence, "us": above the floor, "share": of the step}].
    """
    found: list[Record] = []
    for group in grouped(layers):
        found.append({"what": _sentence(group, ceilings), "us": group["us"] - group["floor_us"]})
    if layers:
        alone = sum(time_of(layer) for layer in layers)
        together = alone if layers_us is None else max(layers_us, alone)
        between, own = network_us - together, us - network_us
        what = "layers that now and then take longer than their median: other work on this machine"
        found.append({"what": what, "us": together - alone})
        if idle_share is not None:
            idle = idle_share * us
            found.append({"what": f"gaps: no kernel runs in {100 * idle_share:.0f} % of the step", "us": idle})
            own -= max(idle - max(between, 0.0), 0.0)
            between -= idle
        found.append({"what": "between the layers of the network", "us": between})
        found.append({"what": "the sampler's own step: its update, its noise, a call's set-up", "us": own})
    for cause in found:
        cause["share"] = cause["us"] / us
    return sorted((cause for cause in found if cause["us"] > 0), key=lambda cause: -cause["us"])


def _sentence(group: Record, ceilings: Ceilings) -> str:
    one = group["layers"] == 1
    words = WORDS.get(group["kind"], WORDS["other"])[0 if one else 1]
    where = f" at {group['size'][0]}x{group['size'][1]}" if group["size"] else ""
    share = 100 * group["floor_us"] / group["us"]
    roof = "product" if group["flops"] / ceilings.flops >= group["bytes"] / ceilings.copy else "copy"
    runs = f"{group['layers']} {words}{where} {'runs' if one else 'run'}"
    return f"{runs} at {share:.0f} % of the {roof} roof: {duration(group['us'])}"


def duration(us: float) -> str:
    """Return microseconds with a unit: "31.4 us", "1.57 ms"."""
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"
