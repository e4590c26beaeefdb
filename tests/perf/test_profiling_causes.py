"""Floors, what bounds a layer and what costs most: arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fastddpm.perf.profiling import causes
from fastddpm.perf.profiling.causes import Ceilings

# 1 TFLOP/s and 100 GB/s: a million operations take 1 us, 100,000 bytes too.
ROOFS = Ceilings(1e12, 100e9, node_us=2.0)


def layer(kind: str, size: tuple[int, int] | None, flops: float, size_bytes: float, us: float, **more: Any) -> Any:
    spread = {"median": us, "p20": us, "p80": us, "min": us, "samples": 9}
    of = list(size) if size else None
    counts = {"kernels": 1, "flops": flops, "bytes": size_bytes}
    return {"name": kind, "kind": kind, "size": of, **counts, "us": spread, **more}


def layers() -> list[Any]:
    found = [
        layer("conv", (8, 8), 30e6, 1e5, 60.0),  # 30 us at the roof of products
        layer("conv", (8, 8), 10e6, 1e5, 40.0),
        layer("conv", (16, 16), 80e6, 1e5, 100.0),
        layer("norm", (8, 8), 0, 3e6, 50.0),  # 30 us at that of copies
        layer("time", None, 0, 1e3, 4.0),  # 0.01 us, but a kernel takes 2
    ]
    causes.judge_layers(found, ROOFS)
    return found


def test_floors_of_layers() -> None:
    found = layers()
    assert [entry["floor_us"] for entry in found] == pytest.approx([30, 10, 80, 30, 0.01])
    assert [entry["share"] for entry in found] == pytest.approx([0.5, 0.25, 0.8, 0.6, 0.0025])
    assert [entry["bound"] for entry in found] == ["compute", "compute", "compute", "memory", "latency"]
    assert causes.time_of(found[0] | {"traced_us": 45.0}) == 45.0


def test_floors_of_a_step() -> None:
    found = causes.floors(layers(), ROOFS, weight_bytes=20_000_000, us=300.02)
    assert found["layers_us"] == pytest.approx(150.01)
    assert found["compute_us"] == pytest.approx(120)
    assert found["weights_us"] == pytest.approx(200)
    assert found["network_us"] == pytest.approx(200)
    assert found["share_of_layers"] == pytest.approx(0.5)
    assert found["share_of_network"] == pytest.approx(200 / 300.02)


def test_causes_make_up_the_distance() -> None:
    """Layers take 254 us, an evaluation on average 260, the network 275, a step 300: nothing is counted twice."""
    found = causes.causes(layers(), ROOFS, 300.0, 275.0, 260.0)
    assert sum(cause["us"] for cause in found) == pytest.approx(300 - 150.01)
    assert [round(cause["us"], 2) for cause in found] == [60.0, 25.0, 20.0, 20.0, 15.0, 6.0, 3.99]
    assert found[0]["what"] == "2 convolutions at 8x8 run at 40 % of the product roof: 100 us"
    assert found[0]["share"] == pytest.approx(0.2)
    assert "the sampler's own step" in found[1]["what"]
    texts = [cause["what"] for cause in found]
    assert "1 convolution at 16x16 runs at 80 % of the product roof: 100 us" in texts
    assert "1 norm at 8x8 runs at 60 % of the copy roof: 50 us" in texts
    assert any(text.startswith("between the layers") for text in texts)
    assert any("other work" in text for text in texts)


def test_idle_time_of_a_gpu_is_a_cause_of_its_own() -> None:
    """Of 300 us a tenth is idle: 21 us lie between the layers, the others are gaps around the sampler's own step."""
    found = causes.causes(layers(), ROOFS, 300.0, 275.0, idle_share=0.1)
    assert sum(cause["us"] for cause in found) == pytest.approx(300 - 150.01)
    by_text = {cause["what"]: cause["us"] for cause in found}
    assert by_text["gaps: no kernel runs in 10 % of the step"] == pytest.approx(30)
    assert next(us for text, us in by_text.items() if "own step" in text) == pytest.approx(16)
    assert not any(text.startswith("between the layers") for text in by_text)


def test_a_layer_above_its_roof_is_no_cause() -> None:
    found = [layer("conv", (4, 4), 10e6, 10, 8.0)]  # by an algorithm that needs fewer operations
    causes.judge_layers(found, ROOFS)
    assert found[0]["share"] == pytest.approx(1.25)
    assert causes.causes(found, ROOFS, 8.0, 8.0) == []


def test_ceilings_of_a_measurement() -> None:
    measured = {
        "matmul_tflops": {"fp16": {"median": 700.0, "best": 790.0}, "fp32": {"error": "no"}},
        "copy_gb_s": {"median": 4000.0, "best": 4300.0},
        "latency": {"graph_node_us": 1.5},
    }
    assert causes.ceilings_of(measured, "fp16") == pytest.approx((790e12, 4300e9, 1.5))
    assert causes.ceilings_of(measured, "fp32") is None
    assert causes.ceilings_of(measured | {"copy_gb_s": {"error": "no"}}, "fp16") is None


@pytest.mark.parametrize(("us", "text"), [(3.14159, "3.14 us"), (999.4, "999 us"), (1234, "1.23 ms"), (2.5e6, "2.5 s")])
def test_durations(us: float, text: str) -> None:
    assert causes.duration(us) == text
