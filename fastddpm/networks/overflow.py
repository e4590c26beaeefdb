"""Measure in float32 whether a network's activations fit into float16.

The largest float16 is 65504. A network that was trained in float32 or bfloat16 may exceed it in some layer at some
timesteps, and its output is then NaN. Measured is the largest magnitude of every tensor that passes from one module
to another.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor, nn

from fastddpm.common import checks
from fastddpm.networks.network import Network, usable_device
from fastddpm.networks.precision import FLOAT16_MAX, parse_precision
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.layers import Attention, ResnetBlock
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import x0_from

_log = logging.getLogger(__name__)

MARGIN = 2.0  # activations stay this factor below float16's maximum: only few samples are measured, but all must fit


@dataclass(frozen=True)
class OverflowReport:
    """The largest activations of a network, and whether float16 holds them.

    Attributes:
        maximum: the largest magnitude, in float32.
        module: the module whose output has it, or "input of ..." a norm.
        timestep: the timestep at which it occurs.
        nonfinite_at: the first timestep at which the network's output in float16 was not finite, or None.
    """

    maximum: float
    module: str
    timestep: int
    nonfinite_at: int | None = None

    @property
    def headroom(self) -> float:
        """How many times larger activations could be and still fit into float16."""
        return FLOAT16_MAX / self.maximum if self.maximum > 0 else math.inf

    @property
    def overflows(self) -> bool:
        """Whether an activation exceeds float16's maximum, or the output in float16 was not finite."""
        return self.nonfinite_at is not None or self.maximum > FLOAT16_MAX

    @property
    def fits(self) -> bool:
        """Whether float16 is safe: every activation stays a factor `MARGIN` below its maximum."""
        return not self.overflows and self.headroom >= MARGIN

    def __str__(self) -> str:
        where = f"{self.module} reaches {self.maximum:.4g} at timestep {self.timestep}"
        text = f"{where}, {self.headroom:.3g} times below float16's end of {FLOAT16_MAX:.0f}"
        if self.maximum > FLOAT16_MAX:
            text = f"{where}, past float16's end of {FLOAT16_MAX:.0f}"
        if self.nonfinite_at is not None:
            text += f"; in float16 the output at timestep {self.nonfinite_at} is not finite"
        return text


class ActivationWatch:
    """Records, while entered, the largest magnitude of every module's output and of every norm's input.

    Args:
        model: any callable; only an `nn.Module` is watched.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._maxima: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._held: dict[str, Tensor] = {}

    def __enter__(self) -> ActivationWatch:
        modules = self._model.named_modules() if isinstance(self._model, nn.Module) else ()
        for name, module in modules:
            self._watch(name, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def maxima(self) -> dict[str, float]:
        """Return the maxima by name of the module, or "input of ..." a norm, in the order of evaluation.

        NaN counts as infinite.
        """
        return {name: _or_infinite(value.item()) for name, value in self._maxima.items()}

    def keep(self, name: str, value: object) -> None:
        """Include a tensor in the maximum of `name`, or all tensors in a list, tuple, mapping or dataclass."""
        for tensor in _tensors(value):
            if tensor.numel():
                largest = tensor.detach().abs().amax().float()
                known = self._maxima.get(name)
                self._maxima[name] = largest if known is None else torch.maximum(known, largest)

    def _watch(self, name: str, module: nn.Module) -> None:
        def returned(_: nn.Module, __: Any, value: object) -> None:
            self.keep(name or "output", value)

        def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.keep(f"input of {name}", (args[:1], kwargs))

        self._handles.append(module.register_forward_hook(returned))
        if "Norm" in type(module).__name__:
            self._handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
        elif isinstance(module, ResnetBlock):
            self._watch_resnet(name, module)
        elif isinstance(module, Attention) and module.group_norm is not None:
            self._handles.append(
                module.register_forward_pre_hook(lambda _, args: self.keep(f"input of {name}.group_norm", args))
            )

    def _watch_resnet(self, name: str, block: ResnetBlock) -> None:
        """Watch the norms of a block, which are not called as modules.

        The first reads the block's input, the second conv1 + time.
        """

        def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = {**dict(zip(("x", "emb", "skip"), args, strict=False)), **kwargs}
            self.keep(f"input of {name}.norm1", [given["x"], given.get("skip")])

        def convolved(_: nn.Module, __: Any, value: Tensor) -> None:
            self._held[name] = value
            if block.scale_shift:
                self.keep(f"input of {name}.norm2", value)

        def projected(_: nn.Module, __: Any, value: Tensor) -> None:
            if not block.scale_shift and name in self._held:
                self.keep(f"input of {name}.norm2", self._held.pop(name) + value[:, :, None, None])

        self._handles += [
            block.register_forward_pre_hook(read, with_kwargs=True),
            block.conv1.register_forward_hook(convolved),
            block.time_emb_proj.register_forward_hook(projected),
        ]


@torch.no_grad()
def activation_ranges(unet: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """Return the largest magnitude of every module's output and every norm's input in one evaluation.

    Args:
        unet: in float32, since a float16 activation that is too large is infinite and hides its magnitude.
        x: float32 [N, ...], the network's input.
        t: int64 [N].
        labels: int64 [N], or None.

    Returns:
        The magnitudes by name of the module, as in `named_modules` ("output" for `unet` itself); "input of NAME" for
        norms. In the order of evaluation. NaN counts as infinite.

    Raises:
        TypeError: `unet` is not an `nn.Module`.
        ValueError: it is not in float32.
    """
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet is a {type(unet).__name__}, must be an nn.Module")
    if other := next((p.dtype for p in unet.parameters() if p.dtype != torch.float32), None):
        raise ValueError(f"unet has parameters in {other}, must be in torch.float32 for its range to be seen")
    network = Network(unet)
    with network.evaluating(), ActivationWatch(network.model) as watch:
        network(x, t, labels)
    return watch.maxima()


@torch.no_grad()
def fp16_overflow(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    *,
    num_timesteps: int = 8,
    num_samples: int = 2,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
    class_labels: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | None = 1.0,
    learned_variance: bool = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> OverflowReport:
    """Report whether a network overflows in float16, by running it in float32 and float16 over the schedule.

    The network reads x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z, where x_0 is its prediction at the previous
    timestep (0 at first). These states resemble those of sampling, in a few evaluations.

    Args:
        model, schedule, prediction_type, device, backend: as for `Sampler`.
        num_timesteps: evaluations, from the last timestep to the first.
        num_samples: N.
        seed: of z.
        shape: of one sample; None for the shape in the model's config.
        class_labels: int64 [N]; None for every class in turn, or with `class_embed_type` "timestep" 0 to N - 1.
        clip_range: the bound of x_0; None scales x_0 to an rms of at most 1 instead.
        learned_variance: whether the second half of the network's channels predicts the variance.

    Raises:
        ValueError: the model's output in float32 is not finite, or as `Sampler`.
        RuntimeError: the device cannot run the model in float16.
    """
    checks.positive(num_timesteps, "num_timesteps")
    count = checks.positive(num_samples, "num_samples")
    exact = Network(model, device, torch.float32, backend)
    half = Network(model, device, torch.float16, backend)
    shape = exact.sample_shape(learned_variance) if shape is None else tuple(shape)
    labels = _labels(exact.config, count, class_labels, exact.device)
    keys = philox.sample_keys([seed] * count, range(count)).to(exact.device)
    peak, nonfinite_at = OverflowReport(0.0, "output", 0), None

    x0 = torch.zeros((count, *shape), device=exact.device)
    with exact.evaluating(), half.evaluating():
        for index, (timestep, bar) in enumerate(_spread(schedule, num_timesteps, prediction_type)):
            z = philox.normal(keys, shape, step=index, stream=philox.STREAM_Q_SAMPLE)
            x = bar.sqrt().float() * x0 + (1 - bar).sqrt().float() * z
            x_in = _with_condition(x, exact.config, keys, index)
            t = torch.full((count,), timestep, dtype=torch.int64, device=exact.device)
            with ActivationWatch(exact.model) as watch:
                out = exact(x_in, t, labels)
            watch.keep("output", out)
            if not bool(out.isfinite().all()):
                raise ValueError(f"model returned values that are not finite at timestep {timestep}, in float32")
            name, maximum = max(watch.maxima().items(), key=lambda item: item[1])
            if maximum > peak.maximum:
                peak = OverflowReport(maximum, name, timestep)
            if nonfinite_at is None and not bool(half(x_in.half(), t, labels).isfinite().all()):
                nonfinite_at = timestep
            a, b = x0_from(prediction_type, bar, torch.tensor(timestep))
            x0 = _bounded(a.float() * x + b.float() * out[:, : x.shape[1]].float(), clip_range)
    return dataclasses.replace(peak, nonfinite_at=nonfinite_at)


def choose_half(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[torch.dtype, str]:
    """Choose float16, or bfloat16 if the model would overflow in float16; return it with the reason in one line.

    On a GPU without hardware bfloat16, float32 replaces it.

    Args:
        model, schedule, device: as for `Sampler`.
        options: of `fp16_overflow`.

    Raises:
        ValueError, RuntimeError: as `fp16_overflow`.
    """
    report = fp16_overflow(model, schedule, device=device, **options)
    if report.fits:
        return torch.float16, f"float16: {report}"
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    place = torch.device(device) if device is not None else torch.device("cpu") if weight is None else weight.device
    if place.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, f"float32: {report}; and this GPU has no bfloat16"
    return torch.bfloat16, f"bfloat16: {report}"


def choose_dtype(
    model: Callable[..., Any],
    schedule: NoiseSchedule | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    **options: Any,
) -> tuple[torch.dtype | None, bool | None]:
    """Return the network's dtype and the TensorFloat-32 setting that a sampler's `dtype` stands for.

    Args:
        model, schedule, dtype, device: as for `Sampler`; "auto" needs a schedule.
        options: of `choose_half`, for "auto".

    Returns:
        The dtype of the network, or None for the model's own; and whether float32 products may be TensorFloat-32, or
        None to keep torch's setting.

    Raises:
        TypeError, ValueError: as `parse_precision`.
    """
    if dtype is None:
        return None, None
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    place = usable_device(device if device is not None else "cpu" if weight is None else weight.device)
    if dtype != "auto":
        chosen, allow_tf32 = parse_precision(dtype, place)
        return chosen, allow_tf32 if isinstance(dtype, str) and chosen == torch.float32 else None
    if place.type != "cuda":
        return None, None
    if not isinstance(model, UNet) or model.config.class_embed_type == "identity":
        return torch.float16, None  # no config tells which input to try it on
    assert schedule is not None
    if model.config.sample_size is None:
        options["shape"] = _some_shape(model.config, bool(options.get("learned_variance")))
    # Eagerly: its kernels would be compiled for this check alone, since sampling runs others.
    half, why = choose_half(model, schedule, device=place, backend="eager", **options)
    _log.log(logging.INFO if half == torch.float16 else logging.WARNING, "dtype 'auto' is %s", why)
    return half, None


def _spread(schedule: NoiseSchedule, count: int, prediction_type: str) -> Iterator[tuple[int, Tensor]]:
    """Yield (timestep, abar) of at most `count` timesteps from the last to the first."""
    last = schedule.num_train_timesteps - 1
    if prediction_type == "epsilon" and schedule.zero_terminal_snr:
        last = max(0, last - 1)  # from pure noise, epsilon does not determine x0
    levels = schedule.alphas_cumprod
    steps = torch.linspace(last, 0, min(count, last + 1), dtype=torch.float64).round().long().tolist()
    for timestep in steps:
        yield timestep, levels[timestep]


def _some_shape(config: UNetConfig, learned_variance: bool) -> tuple[int, int, int]:
    """Return the shape of a test sample for a U-Net without `sample_size`: 32 pixels, or more if its levels need it."""
    size = max(32, 2 ** (len(config.block_out_channels) - 1))
    return (config.out_channels // (2 if learned_variance else 1), size, size)


def _bounded(x0: Tensor, clip_range: float | None) -> Tensor:
    if clip_range is not None:
        return x0.clamp(-clip_range, clip_range)
    rms = x0.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (x0.ndim - 1))
    return x0 / rms.clamp_min(1)


def _labels(config: Any, count: int, given: Tensor | None, device: torch.device) -> Tensor | None:
    classes = getattr(config, "num_class_embeds", None)
    if given is not None:
        return checks.labels(given, count, classes).to(device)
    if classes is None and getattr(config, "class_embed_type", None) == "timestep":
        return torch.arange(count).to(device)  # read as sinusoids, whose magnitude does not depend on the label
    return None if classes is None else (torch.arange(count) % classes).to(device)


def _with_condition(x: Tensor, config: Any, keys: Tensor, index: int) -> Tensor:
    """Return `x` with the further channels that the model reads, if any, filled with noise in [-1, 1] like an image."""
    more = (getattr(config, "in_channels", None) or x.shape[1]) - x.shape[1]
    if more <= 0:
        return x
    shape = (more, *x.shape[2:])
    return torch.cat([x, philox.normal(keys, shape, step=index, stream=philox.STREAM_KNOWN).clamp(-1, 1)], dim=1)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
