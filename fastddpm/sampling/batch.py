"""The inputs that differ from sample to sample: keys, labels, guidance scales, conditions, known regions."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from dataclasses import field as field_of
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.common import checks
from fastddpm.networks.network import Network
from fastddpm.sampling.settings import LoopSettings

NoiseSource = Tensor | Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs that differ from sample to sample, on one device. Tensors of one row stand for all samples.

    Attributes:
        keys: int64 [N, 2], Philox keys (seed, sample index).
        class_labels: int64 [N]; float32 [N] or [N, E] if the network's `class_embed_type` takes these.
        guidance_scale: float32 [1] or [N].
        condition: [N, C', ...], channels that the network reads beside the state.
        known, known_mask: float32, broadcastable to the state and of its rank.
        conditions: what else the network reads, [N, ...] by name.
        unconditional: the same for the unconditional half; what is not there is that of the conditional half. It may
            have "class_labels".
    """

    keys: Tensor
    class_labels: Tensor | None = None
    guidance_scale: Tensor | None = None
    condition: Tensor | None = None
    known: Tensor | None = None
    known_mask: Tensor | None = None
    conditions: dict[str, Tensor] = field_of(default_factory=dict)
    unconditional: dict[str, Tensor] = field_of(default_factory=dict)

    def samples(self, rows: slice) -> Batch:
        """Return the batch of some of the samples."""
        count = len(self.keys)
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                chosen[field.name] = {name: each[rows] for name, each in value.items()}
            elif value is not None and len(value) == count:
                chosen[field.name] = value[rows]
        return replace(self, **chosen)


def make_batch(
    network: Network,
    settings: LoopSettings,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    first_sample: int = 0,
    class_labels: int | Sequence[int] | Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    condition: Tensor | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
) -> Batch:
    """Check the arguments of `Sampler.sample` for samples of `shape` [N, ...] and move them to the network's device.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape or type, or contradicts another.
    """
    count = shape[0]
    labels = _labels(class_labels, count, network, settings)
    own, others = _conditions(conditions, unconditional, count, network, labels)
    scales = _scales(guidance_scale, class_labels is not None, unconditional is not None, count, settings)
    _check_condition(condition, shape, network, settings)
    if (known is None) != (known_mask is None):
        given, missing = ("known", "known_mask") if known_mask is None else ("known_mask", "known")
        raise ValueError(f"{given} is given but {missing} is None, must be given along with it")
    device = network.device
    if known_mask is not None:
        known_mask = checks.broadcastable(known_mask, shape, "known_mask", device)
        if not bool(((known_mask >= 0) & (known_mask <= 1)).all()):
            raise ValueError("known_mask has values outside [0, 1], must be 1 where samples are known and 0 where not")
    return Batch(
        keys=_keys(count, seed, seeds, first_sample).to(device),
        class_labels=None if labels is None else labels.to(device),
        guidance_scale=None if scales is None else scales.to(device),
        condition=None if condition is None else condition.to(device, network.dtype),
        known=None if known is None else checks.broadcastable(known, shape, "known", device),
        known_mask=known_mask,
        conditions=_placed(own, network),
        unconditional={} if scales is None else _placed(others, network),
    )


def _conditions(
    conditions: Mapping[str, Tensor] | None, unconditional: Mapping[str, Tensor] | None, count: int, network: Network,
    labels: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Return both, checked, with an entry for every sample."""
    own = _per_sample(conditions or {}, count, "conditions")
    others = _per_sample(unconditional or {}, count, "unconditional")
    if network.frozen is not None:
        network.frozen.blueprint.check_conditions(own, count)
    for name, value in others.items():
        like = labels if name == "class_labels" else own.get(name)
        if like is None:
            raise ValueError(f"unconditional has {name}, which the conditional half lacks")
        if value.shape != like.shape:
            raise ValueError(f"unconditional has {name} {list(value.shape)}, must have {list(like.shape)}, as there")
    return own, others


def _per_sample(given: Mapping[str, Tensor], count: int, name: str) -> dict[str, Tensor]:
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{key!r}] is a {type(value).__name__}, must be a tensor")
        if value.ndim == 0 or len(value) not in (1, count):
            raise ValueError(f"{name}[{key!r}] has shape {list(value.shape)}, must have one entry, or {count}")
    return {key: value.expand(count, *value.shape[1:]) for key, value in given.items()}


def _placed(given: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """Return conditions on the network's device, numbers in its dtype."""
    return {
        name: value.to(network.device, network.dtype if value.is_floating_point() else value.dtype)
        for name, value in given.items()
    }


def _keys(count: int, seed: int, seeds: Sequence[int] | None, first: int) -> Tensor:
    if isinstance(first, bool) or not isinstance(first, numbers.Integral) or not 0 <= first <= 2**32 - count:
        raise ValueError(f"first_sample is {first!r}, must be an integer from 0 to {2**32 - count}")
    if seeds is None:
        return philox.sample_keys([_seed(seed, "seed")] * count, range(first, first + count))
    if first:
        raise ValueError(f"first_sample is {first} but seeds are given, each of which draws its sample 0; must be 0")
    if len(seeds) != count:
        raise ValueError(f"seeds has {len(seeds)} entries, must have one per sample, {count}")
    return philox.sample_keys([_seed(each, f"seeds[{place}]") for place, each in enumerate(seeds)], [0] * count)


def _seed(value: object, name: str) -> int:
    try:
        seed = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        seed = -1
    if isinstance(value, bool) or not 0 <= seed < 2**64:
        error = ValueError if isinstance(value, numbers.Integral) and not isinstance(value, bool) else TypeError
        raise error(f"{name} is {value}, must be from 0 to 2**64 - 1, an integer")
    return seed


def _labels(
    given: int | Sequence[int] | Tensor | None, count: int, network: Network, settings: LoopSettings
) -> Tensor | None:
    classes, kind = (getattr(network.config, name, None) for name in ("num_class_embeds", "class_embed_type"))
    if kind in ("timestep", "identity"):
        width = getattr(network.config, "embedding_channels", None) if kind == "identity" else 0
        return checks.real_labels(given, count, width, kind)
    if given is None:
        if settings.classifier is not None:
            raise ValueError("classifier_fn needs class_labels, and none were given")
        if classes is None:
            return None
        if settings.null_class is None:
            raise ValueError(f"class_labels is None, must be given: the model has {classes} classes")
        given = settings.null_class
    return checks.labels(given, count, classes)


def _scales(
    given: float | Sequence[float] | Tensor | None, labelled: bool, told: bool, count: int, settings: LoopSettings
) -> Tensor | None:
    """Return guidance scales float32 [1] or [count]; None if no unconditional half is needed."""
    if given is None:
        for name in ("guidance_rescale", "guidance_interval"):
            if value := getattr(settings, name):
                raise ValueError(f"{name} is {value} but guidance_scale is None, must be given with it")
        return None
    if not labelled and not told:
        raise ValueError("guidance_scale needs class_labels or unconditional, and none were given")
    scales = checks.scales(given, count)
    if bool((scales == 1).all()):
        return None
    if settings.null_class is None and not told:
        raise ValueError("guidance_scale needs a null_class, and the model's config names none")
    return scales


def _check_condition(
    condition: Tensor | None, shape: tuple[int, ...], network: Network, settings: LoopSettings
) -> None:
    if condition is not None:
        checks.condition(condition, shape)
    more = 0 if condition is None else condition.shape[1]
    concatenated = settings.self_condition and not network.takes_self_condition
    own = shape[1] * (2 if concatenated else 1)
    reads = getattr(network.config, "in_channels", None)
    if reads is not None and reads < own:
        raise ValueError(f"samples have {own} channels but the model reads {reads}")
    if reads is not None and reads != own + more:
        raise ValueError(
            f"condition has {more} channels but the model reads {reads} and the samples fill {own}: condition must "
            f"have {reads - own}"
        )


def check_noise(
    source: NoiseSource | None, shape: tuple[int, ...], batch_size: int | str | None, name: str
) -> NoiseSource | None:
    """Return `source`, noise [S, N, ...] of `shape`.

    Raises:
        ValueError, TypeError: it is neither such a tensor nor a function, or it is a function that could not know
            which samples it draws for.
    """
    if isinstance(source, Tensor):
        checks.floating(source, shape, name)
    elif source is not None and not callable(source):
        raise TypeError(f"{name} is a {type(source).__name__}, must be a tensor or a function")
    elif source is not None and isinstance(batch_size, int) and batch_size < shape[1]:
        raise ValueError(
            f"{name} is a function but batch_size is {batch_size} for {shape[1]} samples; it cannot know which of "
            "them it draws for, so it must be a tensor"
        )
    return source


class Giver:
    """Puts noise that the user gives into a loop's buffers [n, ...].

    The host's noise goes to CUDA through two page-locked buffers: the copy of one step need not have ended when the
    host draws the next, so the host waits only where it is two steps ahead.
    """

    def __init__(self) -> None:
        self._locked: dict[int, list[tuple[Tensor, torch.cuda.Event]]] = {}  # by the address of the buffer

    def give(self, buffer: Tensor, source: NoiseSource, index: int, rows: slice, name: str) -> None:
        """Put the noise for the row `index` and the samples `rows` into `buffer`."""
        shape = tuple(buffer.shape)
        noise = source[index, rows] if isinstance(source, Tensor) else source(index, shape)
        checks.floating(noise, shape, f"{name} of step {index}")
        if buffer.device.type != "cuda" or noise.device.type != "cpu":
            buffer.copy_(noise)
            return
        locked = self._locked.setdefault(buffer.data_ptr(), [])
        if len(locked) < 2:
            place, copied = torch.empty(shape, dtype=buffer.dtype, pin_memory=True), torch.cuda.Event(blocking=True)
        else:
            place, copied = locked.pop(0)
            if not copied.query():
                copied.synchronize()
        place.copy_(noise)
        buffer.copy_(place, non_blocking=True)
        copied.record(torch.cuda.current_stream(buffer.device))
        locked.append((place, copied))
