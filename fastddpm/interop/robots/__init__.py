"""Diffusion policies of lerobot and of diffusion_policy, called as before, with fastddpm's network and loop inside.

    policy = accelerate(DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht"))
    action = policy.select_action(observation)

Only the loop over the steps is replaced, `conditional_sample`: the vision encoder, the queues and the normalisers stay.
The classes here are derived from the object's own at run time; neither library is imported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.interop.robots.engine import Draw, Engine, Options
from fastddpm.interop.shared import kind_of, not_supported

LIBRARIES = ("lerobot", "diffusion_policy")
# The policies of diffusion_policy whose loops are the same.
_POLICIES = (
    "DiffusionUnetLowdimPolicy", "DiffusionUnetImagePolicy", "DiffusionUnetHybridImagePolicy",
    "DiffusionUnetVideoPolicy",
)  # fmt: skip


def accelerate(
    obj: Any,
    *,
    inplace: bool = False,
    allow_general: bool = True,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graph: str | bool = "auto",
    check_weights: bool = False,
) -> Any:
    """Return a policy whose `conditional_sample` runs fastddpm's network and loop, with the original's random numbers.

    Random numbers come from the same generators in the same order, so the actions are those of the original policy, to
    rounding. No gradient is recorded.

    Args:
        obj: lerobot's `DiffusionPolicy` or its `DiffusionModel`; a policy of diffusion_policy with a
            `ConditionalUnet1D` (low-dimensional, image, hybrid or video); or a tuple of the network of either and a
            scheduler of diffusers, which becomes a `PlanSampler`. Schedulers: those of
            `fastddpm.interop.diffusers.scheduler` that leave the network's input as it is, such as DDPM and DDIM.
        inplace: change the policy itself. Else a new one is returned, which shares the weights.
        allow_general: where the network has been edited, call it as it is in fastddpm's loop, with a warning. False:
            raise ValueError instead.
        dtype, backend, cuda_graph: as for `Sampler`; the dtype of None is the network's. bfloat16 halves what has to be
            read for a step, and so nearly the time.
        check_weights: look at all weights and settings of layers before every call, which takes as long as a step or
            two. Without it the changes that torch itself tells are noticed and taken over: training steps,
            `load_state_dict` and other operations in place, other layers and hooks. Writes through `.data`, to
            inference tensors and to attributes of layers are not.

    Raises:
        TypeError: `obj` is none of these.
        ValueError: a setting of it is not supported, or its class has its own `conditional_sample`.
    """
    engine = Engine(Options(allow_general, dtype, backend, cuda_graph, check_weights))
    if isinstance(obj, (tuple, list)):
        if len(obj) != 2 or not (isinstance(obj[0], nn.Module) and hasattr(obj[1], "set_timesteps")):
            raise not_supported(obj)
        if inplace:
            raise ValueError("inplace is True but obj is a tuple, must be a policy to be changed")
        return PlanSampler(obj[0], copy.deepcopy(obj[1]), engine)
    if _base(obj, "lerobot", ("DiffusionPolicy",)) is not None:
        model = _with_loop(obj.diffusion, engine, inplace)
        if inplace:
            return obj
        result = _copied(obj)
        result._modules["diffusion"] = model
        result.__dict__["_queues"] = copy.deepcopy(getattr(obj, "_queues", None))
        return result
    return _with_loop(obj, engine, inplace)


def _with_loop(obj: Any, engine: Engine, inplace: bool) -> Any:
    """Return an object with its loop replaced; the object itself if `inplace`."""
    cls: Any
    if isinstance(obj, _Loop):
        cls = type(obj)
    elif (base := _base(obj, "lerobot", ("DiffusionModel",))) is not None:
        cls = _derived(_LeRobotLoop, type(obj), base)  # type: ignore[arg-type]
    elif (base := _base(obj, "diffusion_policy", _POLICIES)) is not None:
        cls = _derived(_PolicyLoop, type(obj), base)  # type: ignore[arg-type]
    else:
        raise not_supported(obj)
    engine.check(getattr(obj, cls.network), obj.noise_scheduler)  # raises before anything is changed
    result = obj if inplace else _copied(obj)
    if not inplace:
        result.__dict__["noise_scheduler"] = copy.deepcopy(obj.noise_scheduler)
    result.__class__ = cls
    result.__dict__["_engine"] = engine
    return result


def _base(obj: Any, library: str, names: tuple[str, ...]) -> type | None:
    """Return the first class of an object that a library defines under one of the names, or None."""
    for cls in type(obj).__mro__:
        if cls.__name__ in names and cls.__module__.partition(".")[0] == library and not issubclass(cls, _Loop):
            return cls
    return None


@functools.cache
def _derived(loop: Any, kind: Any, base: Any) -> Any:
    """Return the class `kind`, derived from the library's `base`, with the loop's `conditional_sample`.

    Raises:
        ValueError: it has its own.
    """
    name = "conditional_sample"
    if getattr(kind, name) is not getattr(base, name):
        raise ValueError(f"{kind.__qualname__} has its own {name}, must have that of {base.__qualname__}")
    return type(kind.__name__, (loop, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _copied(module: Any) -> Any:
    """Return a module that shares the parts of another one, but not the dictionaries that hold them."""
    result = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        result.__dict__[name] = dict(module.__dict__[name])
    return result


def _shape(given: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape of samples (N, L, C).

    Raises:
        ValueError: it has not three sizes, or one is not positive.
    """
    if len(given) != 3 or any(size < 1 for size in given):
        raise ValueError(f"shape is {tuple(given)}, must be (samples, positions, values), all positive")
    count, length, channels = given
    return (count, length, channels)


class _Loop:
    """A policy with fastddpm's loop; the rest is the library's class.

    Attributes:
        network: the name of the attribute that is the network.
    """

    network: str
    noise_scheduler: Any
    num_inference_steps: int
    _engine: Engine


class _LeRobotLoop(_Loop):
    """lerobot's `DiffusionModel`."""

    network = "unet"
    config: Any
    unet: Any

    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return samples [batch_size, horizon, action_dim], as the original does."""
        first = next(self.parameters())  # type: ignore[attr-defined]
        shape = (batch_size, self.config.horizon, self.config.action_feature.shape[0])
        draw = Draw(
            _shape(shape if noise is None else noise.shape),
            self.num_inference_steps,
            first.dtype,
            first.device,
            generator,
            start=noise,
        )
        return self._engine.sample(self.unet, self.noise_scheduler, draw, {"global_cond": global_cond})


class _PolicyLoop(_Loop):
    """A policy of diffusion_policy."""

    network = "model"
    model: Any

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return samples of the shape of `condition_data` [N, L, C], as the original does."""
        draw = Draw(
            _shape(condition_data.shape), self.num_inference_steps, condition_data.dtype, condition_data.device,
            generator, known=condition_data, mask=condition_mask, options=kwargs,
        )  # fmt: skip
        conditions = {"local_cond": local_cond, "global_cond": global_cond}
        return self._engine.sample(self.model, self.noise_scheduler, draw, conditions)


class PlanSampler:
    """Draws samples [N, L, C] from a policy's network, as the policies' own loops do.

    Attributes:
        unet: the network; it may be trained, moved and converted.
        scheduler: of diffusers.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, engine: Engine) -> None:
        """See `accelerate`."""
        self.unet, self.scheduler, self._engine = unet, scheduler, engine
        engine.check(unet, scheduler)

    def sample(
        self,
        shape: tuple[int, int, int],
        *,
        global_cond: Tensor | None = None,
        local_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Return samples in the dtype and on the device of the network.

        Args:
            shape: (N, L, C): samples, positions and values at each; L a multiple of the network's factor.
            global_cond: [N, G], if the network takes it.
            local_cond: [N, L, C'], if the network takes it; may be left out.
            generator: of the first draw, torch.randn(shape), and of the noise of the steps; None for torch's own.
            num_inference_steps: of the scheduler; None for all that it was trained on.

        Raises:
            ValueError: a shape does not fit the network; the message names both.
        """
        first = next(self.unet.parameters())
        steps = self.scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        draw = Draw(_shape(shape), steps, first.dtype, first.device, generator)
        conditions = {"global_cond": global_cond, "local_cond": local_cond}
        return self._engine.sample(self.unet, self.scheduler, draw, conditions)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({kind_of(self.unet)}, {kind_of(self.scheduler)})"
