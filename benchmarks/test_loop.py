"""The whole reverse loop, one network in every arm; times are of one step.

"fused" is fastddpm; on a GPU, large sizes also time it in other precisions and ways to run its graph. "eager" is the
loop as one writes it in torch, with the library's U-Net; "compiled" a step of it, network and update, compiled as a
whole and replayed from a graph; "reference" the same in float64, at our noise. The peers are called as their users
call them, at the example's precision, "DDPMPipeline" in float32 as it is loaded. They draw their own noise: what is
checked is their network's prediction, and that they return an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from measuring import (
    ARMS,
    COMPILE_OPTIONS,
    PEERS,
    PRECISIONS,
    Candidate,
    Session,
    Unavailable,
    assert_network_close,
    compiled,
    peer,
)
from networks import AsLucidrains, Problem, make_problem, philox_noise, plain_unet, predict, unet_name
from torch import Tensor

from fastddpm import Sampler
from fastddpm.perf.profiling.timing import capture, first_lines

TRAIN = 1000


class Example(NamedTuple):
    method: str  # "ddpm" or "ddim" (eta 0)
    steps: int
    network: str  # of networks.CONFIGS
    dtype: torch.dtype
    batch: int
    slow_steps: int | None = None  # of all arms but ours, where they take many times longer
    more: bool = False  # time the other precisions and graphs too
    compile: bool = True  # minutes for a large network


def _loops(network: str, *rows: tuple[int, int, int, bool, bool]) -> dict[str, Example]:
    return {
        f"{network} fp16 batch {n}": Example("ddpm", steps, network, torch.float16, n, slow, more, compile)
        for n, steps, slow, more, compile in rows
    }


EXAMPLES = {
    "small": {
        "ddpm 1000 steps fp32 batch 1": Example("ddpm", 1000, "small", torch.float32, 1),
        "ddim 50 steps fp32 batch 4": Example("ddim", 50, "small", torch.float32, 4),
    },
    # (batch, steps, slow steps, more, compile), the most telling first.
    "full": _loops(
        "cifar10", (1, 1000, 50, True, False), (256, 50, 10, True, True), (8, 1000, 50, False, True),
        (64, 200, 20, False, False), (1024, 20, 4, False, False),
    )
    | {"cifar10 ddim 50 steps fp16 batch 64": Example("ddim", 50, "cifar10", torch.float16, 64, 50, compile=False)}
    | _loops("celeba256", (1, 100, 20, False, False), (8, 20, 4, False, False), (32, 10, 2, False, False)),
}  # fmt: skip
# Of a GPU, beside ours: name -> what `Sampler` is given.
MORE: dict[str, dict[str, Any]] = {
    **{f"fused {graph}": {"cuda_graph": graph} for graph in ("while", "unrolled", "step")},
    "fused plain": {"cuda_graph": False},
    **{f"fused {dtype}": {"dtype": dtype} for dtype in ("bfloat16", "tf32", "float32")},
}
CHECKED, CHECK_STEPS = 2, 20  # samples of a batch whose images are compared, after so many steps at most
SMOKE_STEPS = 5  # of a smoke test, which times nothing
Noise = Callable[[int], Tensor]  # of a row; of -1 the state that is started from


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("bench_size") == "full" or torch.cuda.is_available()
    metafunc.parametrize("arm", ["fused", "DDPMPipeline", *ARMS[1:], *PEERS, *MORE] if full else [*ARMS, *PEERS])


def rows_of(of: Example, betas: Tensor) -> tuple[list[int], list[list[float]]]:
    """Return timesteps of "leading" spacing and rows [a, b, c, d, e, s] in float64.

    x0 = clip(a x + b out), x_prev = c x0 + d x + e out + s z: Ho et al. 2020, eq. 7, with the posterior's variance;
    Song et al. 2021, eq. 12, with sigma 0.
    """
    abar, stride = torch.cumprod(1 - betas.double(), 0), TRAIN // of.steps
    timesteps, rows = [i * stride for i in range(of.steps)][::-1], []
    for t in timesteps:
        now, before = abar[t], abar[t - stride] if t >= stride else abar.new_ones(())
        a, b = now**-0.5, -((1 - now) / now).sqrt()
        zero, alpha = torch.zeros_like(now), now / before
        if of.method == "ddim":
            rows.append([a, b, before.sqrt(), zero, (1 - before).sqrt(), zero])
        else:
            variance = (1 - before) / (1 - now) * (1 - alpha)
            c, d = before.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - before) / (1 - now)
            rows.append([a, b, c, d, zero, variance.sqrt() if t else zero])
    return timesteps, [[float(value) for value in row] for row in rows]


class PlainLoop:
    """The loop in torch: state in float32, or float64 for a float64 network; the host waits for nothing."""

    def __init__(self, problem: Problem, unet: Callable[..., Any], of: Example, dtype: torch.dtype) -> None:
        self.unet, self.dtype, self.problem = unet, dtype, problem
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        timesteps, self.rows = rows_of(of, problem.schedule.betas)
        self.timesteps = torch.tensor(timesteps, device=problem.device)
        self.shape = (of.batch, *problem.shape)

    def draw(self, row: int) -> Tensor:
        """Return noise of torch's generator."""
        return torch.randn(self.shape, device=self.problem.device, dtype=self.state)

    @torch.no_grad()
    def __call__(self, noise: Noise | None = None) -> Tensor:
        draw = self.draw if noise is None else noise
        x = draw(-1).to(self.state)
        for row, (a, b, c, d, e, s) in enumerate(self.rows):
            given = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            out = predict(self.unet, given, self.timesteps[row].expand(len(x))).to(self.state)
            new = c * (a * x + b * out).clamp(-1, 1)
            if d:
                new += d * x
            if e:
                new += e * out
            if s:
                new += s * draw(row).to(self.state)
            x = new
        return x


class CompiledLoop:
    """The loop with a step compiled as a whole (network, update and noise), on a GPU replayed from a CUDA graph."""

    def __init__(self, session: Session, problem: Problem, of: Example) -> None:
        self.device, self.steps, self.settings = problem.device, of.steps, {"note": ""}
        unet = plain_unet(problem, of.dtype, channels_last=True, fused=True)
        timesteps, rows = rows_of(of, problem.schedule.betas)
        self.timesteps = torch.tensor(timesteps, device=self.device)
        self.rows = torch.tensor(rows, device=self.device)
        self.x = torch.randn((of.batch, *problem.shape), device=self.device)
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)

        def advance(x: Tensor, step: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
            t = timesteps.index_select(0, step)
            a, b, c, d, e, s = rows.index_select(0, step)[0].unbind()
            given = x.to(of.dtype).contiguous(memory_format=torch.channels_last)
            out = predict(unet, given, t.expand(len(x))).float()
            return c * (a * x + b * out).clamp(-1, 1) + d * x + e * out + s * torch.randn_like(x)

        options = dict(COMPILE_OPTIONS[self.device.type]["options"])
        with torch.no_grad():
            try:
                self._prepare(session, advance, options)
            except Exception as error:  # freezing does not work with everything
                self.settings["note"] = f"without freezing, which failed: {first_lines(error, 1)}"
                self._prepare(session, advance, options | {"freezing": False})

    def _prepare(self, session: Session, advance: Callable[..., Tensor], options: dict[str, Any]) -> None:
        run, settings = compiled(session, advance, options=options)

        def step_once() -> None:
            self.x.copy_(run(self.x, self.step, self.timesteps, self.rows))
            self.step.add_(1)

        self.step.zero_()
        step_once()
        self.step.zero_()
        self.replay = capture([step_once], self.device)
        self.settings |= settings | {"graph": "one step, replayed"}

    @torch.no_grad()
    def __call__(self, steps: int | None = None) -> Tensor:
        self.step.zero_()
        for _ in range(steps or self.steps):
            self.replay()
        return self.x

    def check(self, problem: Problem, of: Example) -> None:
        """Assert that a few steps without noise lead from one state to what eager torch and float64 have."""
        rows, steps = self.rows.clone(), min(CHECK_STEPS, of.steps)
        start = torch.randn(self.x.shape, device=self.device)
        self.rows[:, 5] = 0
        self.x.copy_(start)
        got = self(steps)[:CHECKED].clone()
        self.rows.copy_(rows)
        found = []
        for dtype in (torch.float64, of.dtype):
            loop = PlainLoop(problem, plain_unet(problem, dtype, channels_last=True), of, dtype)
            loop.rows = [[*row[:5], 0.0] for row in loop.rows[:steps]]
            found.append(loop(lambda row: start[:CHECKED]))
        assert_network_close(got, found[0], found[1], of.dtype, "")


@functools.lru_cache(maxsize=2)
def truth(of: Example, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the images of seed 0 in float64, and those of eager torch in the example's dtype, for what that loses."""
    problem = make_problem(of.network, device)
    noise = philox_noise(problem, of.batch)
    networks = {dtype: plain_unet(problem, dtype, channels_last=True) for dtype in (torch.float64, of.dtype)}
    exact, eager = (PlainLoop(problem, unet, of, dtype)(noise) for dtype, unet in networks.items())
    return exact, eager


def test_loop(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    ours = arm.startswith("fused")
    steps = example.steps if ours or example.slow_steps is None else example.slow_steps
    of = example._replace(steps=steps if session.timed else SMOKE_STEPS)

    def build(arm: str) -> Candidate:
        if arm in MORE and (not of.more or session.device.type != "cuda"):
            raise Unavailable("other precisions and graphs are timed at some batch sizes, on a GPU")
        if arm == "compiled" and not (of.compile and session.timed):
            raise Unavailable("a step is compiled with --benchmark-only alone, at some batch sizes: it takes minutes")
        if arm == "reference" and of.slow_steps is not None:
            raise Unavailable("float64 takes minutes at this size; two of its samples are what is compared with")
        problem = make_problem(of.network, session.device)
        if ours:
            call, check, settings = sampling(session, arm, problem, of)
        elif arm in (*PEERS, "DDPMPipeline"):
            call, check, settings = pipeline(arm, problem, of)
        elif arm == "compiled":
            loop = CompiledLoop(session, problem, of)
            call, check, settings = loop, functools.partial(loop.check, problem, of), loop.settings
        else:
            call, check, settings = plainly(arm, problem, of)
        precision = {"bfloat16": "bf16", "tf32": "tf32", "float32": "fp32"}.get(arm.removeprefix("fused "))
        settings |= {"steps": of.steps, "network": of.network, "batch": of.batch}
        flops = problem.flops * of.batch
        return Candidate([call], check, of.steps, 0, flops, precision or PRECISIONS[of.dtype], settings)

    compare(build, seconds=4.0 if session.device.type == "cpu" else 1.5, least=3, most=9)


Ready = tuple[Callable[[], object], Callable[[], None], dict[str, Any]]  # what is called, its check, its settings


def sampling(session: Session, arm: str, problem: Problem, of: Example) -> Ready:
    """Return ours."""
    options: dict[str, Any] = {"dtype": of.dtype, "device": session.device, **MORE.get(arm, {})}
    # tf32 keeps ten bits of what it multiplies, as float16 does.
    named = {"bfloat16": torch.bfloat16, "tf32": torch.float16, "float32": torch.float32}
    like = named.get(options["dtype"], of.dtype)
    sampler = Sampler(problem.unet, problem.schedule, of.method, of.steps, **options)
    backend = getattr(getattr(sampler.network, "frozen", None), "backend", "")

    def check() -> None:
        # Sample k is the same image at any batch size: two samples hold the kernels of this one to what is right.
        few = of._replace(steps=min(of.steps, CHECK_STEPS), batch=min(of.batch, CHECKED), dtype=like)
        short = Sampler(problem.unet, problem.schedule, of.method, few.steps, **options)
        # A loop's images are float32; they are as exact as what its network is computed in.
        assert_network_close(short.sample(of.batch, seed=0)[:CHECKED], *truth(few, session.device), like, backend)

    settings = {"cuda_graph": sampler.graph_report()["mode"], "backend": backend, "dtype": str(options["dtype"])}
    return lambda: sampler.sample(of.batch, seed=0), check, settings


def plainly(arm: str, problem: Problem, of: Example) -> Ready:
    """Return the loop in eager torch: in the example's dtype, or in float64."""
    dtype = torch.float64 if arm == "reference" else of.dtype
    unet = plain_unet(problem, dtype, channels_last=True, fused=arm != "reference")
    loop = PlainLoop(problem, unet, of, dtype)

    def check() -> None:
        few = of._replace(steps=min(of.steps, CHECK_STEPS), batch=min(of.batch, CHECKED))
        if arm != "reference":  # which is the truth
            images = PlainLoop(problem, unet, few, dtype)(philox_noise(problem, few.batch))
            assert_network_close(images, *truth(few, problem.device), of.dtype, "")

    return loop, check, {"network": unet_name(unet), "channels_last": True, "dtype": str(dtype)}


def pipeline(name: str, problem: Problem, of: Example) -> Ready:
    """Return a peer's loop as its users call it.

    Raises:
        Missing: it is not installed.
        Unavailable: it is the same as another arm.
    """
    as_it_comes = name == "DDPMPipeline"
    if as_it_comes and of.method == "ddim":
        raise Unavailable("it samples by DDPM")
    peer("diffusers" if as_it_comes else name)
    dtype = torch.float32 if as_it_comes else of.dtype
    unet = plain_unet(problem, dtype, channels_last=not as_it_comes, fused=not as_it_comes)
    size, ddim = problem.shape[1], of.method == "ddim"
    settings: dict[str, Any] = {"network_of": unet_name(unet), "channels_last": not as_it_comes, "dtype": str(dtype)}
    if name == "denoising_diffusion_pytorch":
        from denoising_diffusion_pytorch import GaussianDiffusion

        network: Any = AsLucidrains(unet)
        # Its DDPM cannot leave out steps: a shorter loop is a schedule of that length, which "linear" cannot be.
        train = TRAIN if ddim else of.steps
        diffusion: Any = GaussianDiffusion(
            network, image_size=size, timesteps=train, sampling_timesteps=of.steps,
            beta_schedule="linear" if train == TRAIN else "cosine",
            objective="pred_noise", auto_normalize=True,
        ).to(problem.device).eval()  # fmt: skip
        autocast = of.dtype.itemsize < 4

        @torch.no_grad()
        def call() -> Any:
            with torch.autocast(problem.device.type, of.dtype if autocast else None, enabled=autocast):
                return diffusion.sample(batch_size=of.batch)

        settings |= {"call": "GaussianDiffusion.sample()"}
    else:
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        scheduler = (DDIMScheduler if ddim else DDPMScheduler)(TRAIN, beta_start=1e-4, beta_end=0.02)
        pipe: Any = (DDIMPipeline if ddim else DDPMPipeline)(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)

        def call() -> Any:
            return pipe(batch_size=of.batch, num_inference_steps=of.steps, output_type="np").images

        settings |= {"call": f"{type(pipe).__name__}()"}

    def check() -> None:
        images = torch.as_tensor(call())
        assert images.numel() == of.batch * problem.shape[0] * size * size
        assert bool(((images >= 0) & (images <= 1)).all())
        x = torch.randn(CHECKED, *problem.shape, device=problem.device)
        t = torch.full((CHECKED,), 500, device=x.device)
        exact, eager = (plain_unet(problem, other, channels_last=True) for other in (torch.float64, dtype))
        with torch.no_grad():
            outs = [predict(net, x.to(of), t) for net, of in ((unet, dtype), (exact, torch.float64), (eager, dtype))]
        assert_network_close(outs[0], outs[1], outs[2], dtype, "")

    return call, check, settings
