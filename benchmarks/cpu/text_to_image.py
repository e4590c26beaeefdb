"""One evaluation of text-to-image U-Nets of random weights on a CPU: time and memory, each arm in its own process.

    python benchmarks/cpu/text_to_image.py --out results.json [--networks sd15,sdxl,if1] [--rounds 3]
    python benchmarks/cpu_check.py --sections text_to_image --out results.json

    diffusers       UNet2DConditionModel as called
    torch.compile   that under inductor, weights frozen
    openvino        that converted, as OpenVINO's hint for the precision says
    fastddpm        `accelerate(unet)`, its weights in memory once

A U-Net of a billion parameters does not fit into memory four times. So arms run one after another, each measures its
peak, and each is held against diffusers in float32, which is measured first whatever is asked for, on one input: text
and timestep are the same. `--out` adds a run to those of the file. torch.compile takes minutes to compile.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script
from gpu.results import commit_here

XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
IF: dict[str, Any] = {  # IF-I at half its width
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (352, 704, 1056, 1408),
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "cross_attention_dim": 1408,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "addition_embed_type": "text",
    "resnet_time_scale_shift": "scale_shift",
}
# (config, size of the input, tokens, their width)
NETWORKS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "sd15": ({"cross_attention_dim": 768}, 64, 77, 768),
    "sdxl": (XL, 32, 77, 2048),
    "if1": (IF, 64, 77, 4096),
    "tiny": ({"cross_attention_dim": 768, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}, 16, 77, 768),
}
ARMS = ("diffusers", "torch.compile", "openvino", "fastddpm")
BASELINE = ("diffusers", "float32")
BATCH, T = 2, 500
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}  # rms, of the rms of the output


def network(name: str, dtype: torch.dtype) -> tuple[Any, Tensor, dict[str, Any]]:
    """Return the U-Net, an input of `BATCH` samples, and the conditions of a call, all of seed 0."""
    from diffusers import UNet2DConditionModel

    config, size, tokens, width = NETWORKS[name]
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**config).eval().requires_grad_(False)
    torch.manual_seed(1)
    x, text = torch.randn(BATCH, unet.config.in_channels, size, size), torch.randn(BATCH, tokens, width)
    given: dict[str, Any] = {"encoder_hidden_states": text.to(dtype)}
    if config.get("addition_embed_type") == "text_time":
        ids = torch.tensor([[8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]]).expand(BATCH, -1)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(BATCH, 1280).to(dtype), "time_ids": ids.to(dtype)}
    print(f"{sum(p.numel() for p in unet.parameters()) * dtype.itemsize / 2**30:.2f} GiB of weights", flush=True)
    return torch.nn.Module.to(unet, dtype), x.to(dtype), given


def arm(name: str, kind: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return what evaluates the network once."""
    unet, x, given = network(name, torch.float32 if kind == "openvino" else dtype)
    t = torch.tensor(T)

    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, return_dict=False, **given)[0]

    if kind == "diffusers":
        return lambda: unet(x, t, return_dict=False, **given)[0]
    if kind == "torch.compile":
        compiled = torch.compile(Output(), dynamic=False, options={"freezing": True})
        return lambda: compiled(x, t)
    if kind == "openvino":
        import openvino as ov

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, of checks of shapes
            model = ov.convert_model(Output(), example_input=(x, t), input=[tuple(x.shape), tuple(t.shape)])
        hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        arrays = [x.numpy(), t.numpy()]
        return lambda: torch.from_numpy(next(iter(request.infer(arrays).values())))
    from fastddpm import accelerate

    ours = accelerate(unet, inplace=True, release=True, allow_general=False)
    return lambda: ours(x, t, return_dict=False, **given)[0]


@torch.no_grad()
def child(name: str, kind: str, dtype: str, rounds: int, threads: int, out: Path) -> None:
    """Measure an arm in this process; write its output and print its record."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    call = arm(name, kind, getattr(torch, dtype))
    first = call().float()
    ready, seconds = time.perf_counter() - begin, []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.save(first, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": sorted(seconds)[rounds // 2], "ready_s": round(ready, 1), "peak_gib": round(peak, 2)}))


def measure(name: str, arms: list[str], dtypes: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return a record for every arm and precision: seconds, peak memory, error and times as fast as diffusers."""
    records: list[dict[str, Any]] = []
    asked = [(kind, dtype) for dtype in dtypes for kind in arms]
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "diffusers-float32.pt"
        for kind, dtype in dict.fromkeys([BASELINE, *asked]):
            out = Path(folder) / f"{kind}-{dtype}.pt"
            words = ["--child", name, kind, dtype, str(rounds), str(threads), str(out)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
            record: dict[str, Any] = {"network": name, "batch": BATCH, "arm": kind, "dtype": dtype}
            if done.returncode:
                record |= {"status": "failed", "reason": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
            else:
                record |= {"status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}
                if first.exists():
                    exact, own = torch.load(first), torch.load(out)
                    record["error"] = float((own - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                    if not record["error"] <= BOUNDS[dtype]:
                        record["status"] = "wrong"
                if (records or [record])[0]["status"] == "ok":
                    record["times_as_fast"] = round((records or [record])[0]["seconds"] / record["seconds"], 2)
            records.append(record)
            print(json.dumps(record), flush=True)
    return records


def run(networks: list[str], arms: list[str], dtypes: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Return the records of all networks, and what they were measured with."""
    records = [record for name in networks for record in measure(name, arms, dtypes, rounds, threads)]
    commit, dirty = commit_here()
    return {
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit, "dirty": dirty,
        "torch": torch.__version__, "threads": threads, "rounds": rounds, "records": records,
    }  # fmt: skip


def main() -> int:
    """Run the command; return 1 where an arm was not measured."""
    if "--child" in sys.argv:
        name, kind, dtype, rounds, threads, out = sys.argv[sys.argv.index("--child") + 1 :]
        child(name, kind, dtype, int(rounds), int(threads), Path(out))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="write the figures there, as JSON")
    add("--networks", default="sd15,sdxl,if1", help=f"of {','.join(NETWORKS)} (default: %(default)s)")
    add("--arms", default=",".join(ARMS), help="besides diffusers in float32 (default: %(default)s)")
    add("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    add("--rounds", type=int, default=3, help="evaluations of an arm (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    options = parser.parse_args()
    names = (options.networks.split(","), options.arms.split(","), options.dtypes.split(","))
    found = run(*names, options.rounds, options.threads)
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
        options.out.write_text(json.dumps({"runs": [*before["runs"], found]}, indent=1) + "\n")
    return int(any(record["status"] != "ok" for record in found["records"]))


if __name__ == "__main__":
    sys.exit(main())
