"""The reverse loop against diffusers' pipelines, closed forms, and its own promises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import unets
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from fastddpm_kernels import philox
from torch import Tensor, nn

from fastddpm.networks.network import Network
from fastddpm.networks.unet.model import UNet
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

SMALL: dict[str, Any] = unets.SMALL | {"block_out_channels": (16, 32), "attention_head_dim": None}


def small_unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes}).eval()


def toy(x: Tensor, t: Tensor) -> Tensor:
    """A cheap nonlinear network that depends on position, time and sample."""
    scale = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.tanh(x * (0.5 + scale)) + 0.1 * scale


class Recorder:
    """Stands in for diffusers' randn_tensor: draws in its order and keeps what it drew."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __call__(self, shape: tuple[int, ...], *_: object, **__: object) -> Tensor:
        self.drawn.append(torch.randn(shape))
        return self.drawn[-1]


EPSILON_LARGE = {"variance_type": "fixed_large", "prediction_type": "epsilon", "clip_sample": True}
EPSILON_SMALL = {"variance_type": "fixed_small", "prediction_type": "epsilon", "clip_sample": True}
V_UNCLIPPED = {"variance_type": "fixed_small", "prediction_type": "v_prediction", "clip_sample": False}


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        pytest.param(1000, EPSILON_LARGE, id="google/ddpm-cifar10-32's settings"),
        pytest.param(10, EPSILON_SMALL, id="fixed_small"),
        pytest.param(10, V_UNCLIPPED, id="v_prediction, no clipping"),
    ],
)
def test_equals_ddpm_pipeline_at_equal_noise(
    steps: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = small_unet()
    theirs = UNet2DModel(**SMALL).eval()
    theirs.load_state_dict(ours.state_dict())
    pipeline = DDPMPipeline(theirs, DDPMScheduler(**settings))
    pipeline.set_progress_bar_config(disable=True)
    recorder = Recorder()
    for module in ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", recorder)
    expected = pipeline(batch_size=2, num_inference_steps=steps, output_type="pt").images
    sampler = Sampler(ours, NoiseSchedule.linear(), num_inference_steps=steps, **settings)
    x_T, *noise = recorder.drawn
    images = sampler.sample(2, x_T=x_T, noise=lambda index, shape: noise[index])
    assert len(noise) == steps - 1  # diffusers draws none at t = 0
    # The pipeline ends with a clip to [0, 1]. Both compute in float32, with different but equivalent formulas, and
    # the loop of an untrained network is chaotic without clipping: the bound grows with the steps.
    difference = ((images / 2 + 0.5).clamp(0, 1) - expected).abs().max()
    assert float(difference) < 2e-4


def test_noise_tensor_and_callable_are_the_same() -> None:
    sampler = Sampler(toy, NoiseSchedule.linear(), num_inference_steps=7)
    noise, x_T = torch.randn(7, 3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    one = sampler.sample(3, x_T=x_T, noise=noise)
    calls: list[int] = []

    def draw(index: int, shape: tuple[int, ...]) -> Tensor:
        assert shape == (3, 2, 4, 4)
        calls.append(index)
        return noise[index]

    assert torch.equal(one, sampler.sample(3, x_T=x_T, noise=draw))
    assert calls == list(range(6))  # the last step adds no noise


def test_explicit_timesteps() -> None:
    schedule = NoiseSchedule.linear()
    listed = Sampler(toy, schedule, timesteps=[800, 600, 400, 200, 0])
    assert torch.equal(
        listed.sample(2, shape=(2, 3)), Sampler(toy, schedule, num_inference_steps=5).sample(2, shape=(2, 3))
    )
    assert Sampler(toy, schedule, timesteps=torch.tensor([999, 3])).timesteps.tolist() == [999, 3]


# -- parts of a loop, other tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_loop_continues_where_it_was(method: str) -> None:
    sampler = Sampler(toy, NoiseSchedule.linear(), method, 6)
    states: list[Tensor] = []
    images = sampler.sample(3, shape=(2, 4), seed=8, callback=lambda i, t, x: states.append(x.clone()))
    for start in range(1, 6):
        assert torch.equal(images, sampler.sample(3, x_T=states[start - 1], start=start, seed=8))


def test_a_multistep_loop_starts_with_a_first_order_step() -> None:
    sampler = Sampler(toy, NoiseSchedule.linear(), "dpmsolver++", 8)
    x = torch.randn(2, 3, 4)
    one = sampler.sample(2, x_T=x, start=3)
    assert torch.equal(one, sampler.sample(2, x_T=x, table=sampler.table.skip(3)))
    first = Sampler(toy, NoiseSchedule.linear(), "dpmsolver++", 8, solver_order=1)
    states: list[list[Tensor]] = [[], []]
    for kept, which in zip(states, (sampler, first), strict=True):
        which.sample(2, x_T=x, start=3, callback=lambda i, t, x, kept=kept: kept.append(x.clone()))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=1e-6)
    assert not torch.allclose(states[0][1], states[1][1], atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("drawn", [True, False])
def test_known_regions(backend: str, drawn: bool, device: torch.device) -> None:
    """RePaint's eq. 8 restated: after every step the known part is the image at that step's level."""
    if backend == "triton":
        pytest.importorskip("triton")
    schedule = NoiseSchedule.linear()

    def mixing(x: Tensor, t: Tensor) -> Tensor:
        return toy(x + x.mean((1, 2, 3), keepdim=True), t)

    known, mask = torch.rand(3, 2, 4, 5), torch.rand(4, 5).round()
    noise, z2 = torch.randn(6, 3, 2, 4, 5), torch.randn(6, 3, 2, 4, 5)
    sampler = Sampler(mixing, schedule, num_inference_steps=6, backend=backend, device=device)
    x_T = torch.randn(3, 2, 4, 5)
    if drawn:
        images = sampler.sample(3, x_T=x_T, known=known, known_mask=mask > 0, seed=4, batch_size=2)
        keys = philox.sample_keys([4] * 3, range(3))
        for index in range(6):
            noise[index] = philox.normal(keys, (2, 4, 5), step=index, stream=philox.STREAM_STEP)
            z2[index] = philox.normal(keys, (2, 4, 5), step=index, stream=philox.STREAM_KNOWN)
    else:
        given = {"noise": noise, "known_noise": z2}
        images = sampler.sample(3, x_T=x_T, known=known, known_mask=mask, batch_size=2, **given)
    plain = Sampler(mixing, schedule, num_inference_steps=6)
    x = x_T
    for index, (signal, sigma) in enumerate(plain.table.levels.tolist()):
        x = plain.sample(3, x_T=x, start=index, noise=noise, callback=lambda i, t, x: True)  # this one step
        x = mask * (signal * known + sigma * z2[index]) + (1 - mask) * x
    torch.testing.assert_close(images.cpu(), x, rtol=0, atol=1e-5)
    assert torch.equal(images.cpu() * mask, known * mask)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_steps_back_up_ask_the_network_nothing(backend: str, device: torch.device) -> None:
    """A RePaint walk, restated with the plain sampler's steps down and the forward process up; with guidance too."""
    if backend == "triton":
        pytest.importorskip("triton")
    schedule = NoiseSchedule.linear()
    # Without graphs, since the model notes on the host what it sees.
    settings: dict[str, Any] = {"num_inference_steps": 6, "backend": backend, "device": device, "cuda_graph": False}
    sampler = Sampler(Conditional(), schedule, guidance_scale=2.0, variance_type="fixed_large", **settings)
    table = repaint_table(schedule, sampler.timesteps, jump_length=2, jump_n_sample=3, variance_type="fixed_large")
    noise = torch.randn(len(table), 2, 1, 4, 4)
    x_T = torch.randn(2, 1, 4, 4)
    images = sampler.sample(2, x_T=x_T, table=table, noise=noise, class_labels=[0, 2])
    down = int(table.needs_network.sum())
    assert down < len(table)
    assert len(sampler.model.seen) == down  # type: ignore[attr-defined]
    x, row = x_T, 0
    for index, needed in enumerate(table.needs_network.tolist()):
        if needed:
            z = noise[index].expand(6, *x.shape)
            x = sampler.sample(2, x_T=x, start=row, noise=z, class_labels=[0, 2], callback=lambda i, t, x: True).cpu()
            row += 1
        else:
            row -= 1
            levels = schedule.alphas_cumprod[sampler.timesteps[row]], sampler.table.levels[row, 0] ** 2
            alpha = float(levels[0] / levels[1])
            x = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise[index]
    torch.testing.assert_close(images.cpu(), x, rtol=0, atol=2e-5)


def test_repaint_with_a_learned_variance() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([toy(x, t), -torch.ones_like(x)], dim=1)  # v = -1: the small variance

    schedule = NoiseSchedule.linear()
    images = []
    for network, variance_type in ((model, "learned_range"), (toy, "fixed_small")):
        sampler = Sampler(network, schedule, num_inference_steps=6, variance_type=variance_type)
        table = repaint_table(schedule, sampler.timesteps, jump_length=2, jump_n_sample=2, variance_type=variance_type)
        images.append(sampler.sample(2, shape=(2, 5), table=table, seed=3))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_sample_k_of_a_seed_does_not_depend_on_the_batch() -> None:
    sampler = Sampler(toy, NoiseSchedule.linear(), num_inference_steps=5)
    ten = sampler.sample(10, shape=(3, 5, 7), seed=42)
    assert torch.equal(ten, sampler.sample(10, shape=(3, 5, 7), seed=42, batch_size=3))
    assert torch.equal(ten[:4], sampler.sample(4, shape=(3, 5, 7), seed=42))
    assert not torch.equal(ten, sampler.sample(10, shape=(3, 5, 7), seed=43))
    assert len({tuple(image.flatten()[:4].tolist()) for image in ten}) == 10


def test_seeds_give_one_image_each() -> None:
    sampler = Sampler(toy, NoiseSchedule.linear(), num_inference_steps=5)
    images = sampler.sample(3, shape=(1, 4, 4), seeds=[7, 2**63 + 5, 7])
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], sampler.sample(1, shape=(1, 4, 4), seed=7)[0])


SHAPES = {"vector": (5,), "signal": (2, 19), "points": (16, 3), "image": (3, 4, 5), "video": (2, 3, 4, 5)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_shape_of_data(shape: tuple[int, ...]) -> None:
    images = Sampler(toy, NoiseSchedule.linear(), num_inference_steps=4).sample(3, shape=shape)
    assert images.shape == (3, *shape)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1


@pytest.mark.parametrize(
    ("shape", "method", "dtype"),
    [
        (SHAPES["vector"], "ddpm", torch.float16),
        (SHAPES["signal"], "dpmsolver++", torch.float32),
        (SHAPES["points"], "ddpm", torch.float32),
        (SHAPES["image"], "ddpm", torch.float32),
        (SHAPES["image"], "dpmsolver++", torch.float16),
        (SHAPES["video"], "ddpm", torch.float16),
    ],
    ids=str,
)
def test_any_shape_with_everything(
    shape: tuple[int, ...], method: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Every option at once, on the fused kernel and in plain torch: the same samples."""
    pytest.importorskip("triton")
    channels = shape[0]

    def model(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        assert x.dtype == dtype
        before, state, condition = x.split([channels, channels, 1], dim=1)
        out = torch.tanh(state + 0.3 * before + condition) + 0.1 * class_labels.view(-1, *[1] * len(shape))
        return torch.cat([out, 0.5 * out], dim=1).to(dtype)

    arguments: dict[str, Any] = {
        "x_T": torch.randn(3, *shape),
        "class_labels": [0, 1, 2],
        "guidance_scale": [1.0, 3.0, 2.0],
        "condition": torch.randn(3, 1, *shape[1:]),
        "known": torch.rand(shape),
        "known_mask": torch.rand(shape[1:]).round(),
        "return_trajectory": 2,
        "batch_size": 2,
    }
    one, other = (
        Sampler(
            model,
            NoiseSchedule.linear(),
            method,
            5,
            variance_type="learned_range",
            thresholding=True,
            sample_max_value=2.0,
            guidance_interval=(100, 700),
            guidance_rescale=0.5,
            classifier_fn=lambda x, t, y: -x,
            self_condition=True,
            null_class=3,
            dtype=dtype,
            device=device,
            backend=backend,
        ).sample(3, **arguments)
        for backend in ("triton", "eager")
    )
    assert one.x.shape == one.x0.shape == (3, 3, *shape)
    # float16: what the two round differently may fall to the other side in the network's input
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(one.x, other.x, rtol=0, atol=tolerance)
    torch.testing.assert_close(one.x0, other.x0, rtol=0, atol=tolerance)


def test_backends_agree() -> None:
    one, other = (
        Sampler(small_unet(), NoiseSchedule.linear(), num_inference_steps=4, backend=backend).sample(2, seed=1)
        for backend in ("eager", "reference")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


class Conditional(nn.Module):
    """Predicts from its label alone; with a config as UNet has."""

    class config:  # stands for an attribute
        sample_size, in_channels, num_class_embeds, null_class = 4, 1, 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("gain", nn.Parameter(torch.ones(1)))
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.seen.append(class_labels.tolist())
        return self.gain * class_labels.view(-1, 1, 1, 1).to(x) / 4 + 0.1 * x


def test_guidance_is_one_doubled_batch() -> None:
    model = Conditional()
    sampler = Sampler(model, NoiseSchedule.linear(), num_inference_steps=3, guidance_scale=2.5)
    images = sampler.sample(2, class_labels=[0, 2], seed=5)
    assert model.seen == [[3, 3, 0, 2]] * 3

    def guided(x: Tensor, t: Tensor) -> Tensor:
        labels = torch.tensor([0, 2])
        null, cond = (label.view(-1, 1, 1, 1).to(x) / 4 + 0.1 * x for label in (torch.full_like(labels, 3), labels))
        return null + 2.5 * (cond - null)

    expected = Sampler(guided, NoiseSchedule.linear(), num_inference_steps=3).sample(2, shape=(1, 4, 4), seed=5)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_labels_go_to_their_images_in_every_chunk() -> None:
    model = Conditional()
    sampler = Sampler(model, NoiseSchedule.linear(), num_inference_steps=1)
    sampler.sample(5, class_labels=torch.tensor([0, 1, 2, 1, 0]), batch_size=2)
    assert model.seen == [[0, 1], [2, 1], [0]]
    model.seen.clear()
    sampler.sample(2, class_labels=1)
    sampler.sample(1)
    assert model.seen == [[1, 1], [3]]  # without labels: the null class


@pytest.mark.parametrize("wrap", [lambda out: (out,), lambda out: type("Output", (), {"sample": out})()])
def test_outputs_of_other_libraries_are_unwrapped(wrap: Callable[[Tensor], Any]) -> None:
    schedule = NoiseSchedule.linear()
    plain = Sampler(toy, schedule, num_inference_steps=2).sample(1, shape=(1, 2, 2))
    wrapped = Sampler(lambda x, t: wrap(toy(x, t)), schedule, num_inference_steps=2).sample(1, shape=(1, 2, 2))
    assert torch.equal(plain, wrapped)


def test_the_users_model_stays_as_it_is() -> None:
    model = small_unet(dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = Sampler(model, NoiseSchedule.linear(), num_inference_steps=2)
    assert torch.equal(sampler.sample(1), sampler.sample(1))  # no dropout while sampling
    assert model.training
    Sampler(model, NoiseSchedule.linear(), num_inference_steps=1, dtype=torch.bfloat16).sample(1)
    assert model.conv_in.weight.dtype == torch.float32
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not sampler.sample(1).requires_grad


def test_callback_sees_every_step_and_can_stop() -> None:
    seen: list[tuple[int, int]] = []

    def watch(index: int, timestep: int, x: Tensor) -> bool:
        seen.append((index, timestep))
        return index == 2

    Sampler(toy, NoiseSchedule.linear(), num_inference_steps=10).sample(1, shape=(1, 2, 2), callback=watch)
    assert seen == [(0, 900), (1, 800), (2, 700)]


@pytest.mark.gpu
def test_a_model_in_its_place_is_not_copied() -> None:
    model = small_unet().to("cuda")
    assert Sampler(model, NoiseSchedule.linear(), device="cuda").model is model


@pytest.mark.parametrize("frozen", [True, False])
def test_inference_mode_of_one_call_does_not_spoil_the_next(frozen: bool) -> None:
    model: Any = small_unet() if frozen else toy
    sampler = Sampler(model, NoiseSchedule.linear(), num_inference_steps=2)
    with torch.inference_mode():
        first = sampler.sample(1, shape=(3, 8, 8))
        assert not first.is_inference()
    assert torch.equal(sampler.sample(1, shape=(3, 8, 8)), first)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("row", [0, 1, 4])
def test_samples_that_are_not_finite_are_named_with_their_first_step(dtype: str, row: int) -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        wrong = (t <= [800, 600, 400, 200, 0][row]) & (x.flatten(1)[:, 0] > 0)
        return torch.where(wrong.view(-1, 1, 1, 1), torch.nan, torch.zeros_like(x))

    sampler = Sampler(model, NoiseSchedule.linear(), num_inference_steps=5, dtype=dtype, clip_sample=False)
    with pytest.warns(RuntimeWarning, match="samples are not finite") as caught:
        images = sampler.sample(16, shape=(1, 2, 2), batch_size=5, seed=3)
    assert [warning.filename for warning in caught] == [__file__]  # of the caller
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    assert 0 < len(bad) < 16
    message = str(caught[0].message)
    assert message.startswith(f"{len(bad)} of 16 samples are not finite ({', '.join(map(str, bad[:8]))}")
    rows: list[int] = []
    with pytest.warns(RuntimeWarning):
        sampler.sample(
            16, shape=(1, 2, 2), seed=3,
            callback=lambda k, t, x: None if x[bad[0]].isfinite().all() else rows.append(k),
        )  # fmt: skip
    assert rows[0] >= row
    assert f"sample {bad[0]} since step {rows[0] + 1} of 5 (timestep {800 - 200 * rows[0]})" in message
    assert ("overflow in float16" in message) == (dtype == "float16")


def test_samplers_of_one_model_share_its_eval_mode() -> None:
    """Where one is done while another still runs, its dropout stays off."""
    model = nn.Sequential(nn.Dropout())
    first, second = Network(model), Network(model)
    with contextlib.ExitStack() as outer:
        with first.evaluating():
            outer.enter_context(second.evaluating())
        assert not model[0].training
    assert model[0].training
    assert model.training
