"""Pipelines of diffusers around a UNet2DConditionModel, called as before, with the U-Net and the loop fast.

    pipe = accelerate(StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5"))
    image = pipe("a lighthouse in a storm", generator=torch.manual_seed(0)).images[0]

`forward` takes over the U-Net's forward, which serves every pipeline, scheduler and adapter. `loop` takes over the
whole loop of the pipelines that it knows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn

from fastddpm.interop.conditional.forward import Forward, Options, Unsupported
from fastddpm.interop.conditional.loop import KeepLoop, Loop, Samplers, pipeline_of
from fastddpm.interop.diffusers.unet import unwrapped
from fastddpm.interop.shared import not_supported

__all__ = ["Forward", "Options", "accelerate", "takes", "unaccelerate"]

_log = logging.getLogger(__name__)


def takes(obj: Any) -> bool:
    """Return whether an object is a UNet2DConditionModel of diffusers, or a pipeline that has one."""
    return _is_conditional(obj) or (_is_pipeline(obj) and bool(_unets(obj)))


def accelerate(
    obj: Any,
    *,
    inplace: bool = False,
    allow_general: bool = True,
    loop: bool = True,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graph: str | bool = "auto",
    release: bool = False,
) -> Any:
    """A pipeline of diffusers whose UNet2DConditionModel runs prepared; its arguments and results stay the same.

    The U-Net stays a module of its class: it may be moved, converted, trained, or given adapters, processors or hooks
    afterwards. Every call of the pipeline looks at what is there. What the prepared U-Net does not compute (gradients,
    adapters that are not fused, attention arguments, offloading) is diffusers' own forward, which is logged once.

    Where nothing needs the host between steps (no callback) and the scheduler is one of `scheduler.SCHEDULERS`, the
    pipelines of `loop.PIPELINES` run their whole loop as `Sampler` does: captured on CUDA, in one native call on the
    CPU. Random numbers are drawn as in the original, in its order, from `generator=` or from torch's own.

    The components are shared, but for the scheduler, which is copied, and the U-Net, whose copy shares all parameters
    and layers; with `inplace` nothing is copied.

    Args:
        obj: a pipeline that has a UNet2DConditionModel, or that module alone.
        inplace: change the pipeline or the module itself.
        allow_general: False: raise ValueError where a call is diffusers' own to compute, instead of logging it.
        loop: False: never take over the loop, only the U-Net.
        dtype: that the U-Net computes in, as for `Sampler`; None for its own. Inputs and results keep theirs.
        backend, cuda_graph: as for `Sampler`.
        release: keep the U-Net's weights in memory once: its own go when it is prepared, at the first call. It cannot
            be saved or trained after that, nor compute what the prepared U-Net does not; such a call is an error. No
            sample is compared before.

    Raises:
        TypeError: `obj` is neither.
        ValueError: an option is not known; or a U-Net is not supported and `allow_general` is False.
    """
    options = Options(allow_general, loop, dtype, backend, cuda_graph, release)
    if _is_conditional(obj):
        return _taken(unwrapped(obj), options, inplace)
    if not takes(obj):
        raise not_supported(obj)
    pipe = obj if inplace else copy.copy(obj)
    if isinstance(pipe, _Accelerated):
        unaccelerate(pipe)
    if not inplace and hasattr(obj, "scheduler"):
        pipe.__dict__["scheduler"] = copy.deepcopy(obj.scheduler)
    state = _State(options, inplace)
    state.follow(pipe)
    pipe.__class__ = _class_of(type(pipe))  # type: ignore[arg-type]
    pipe.__dict__["_fastddpm"] = state
    return pipe


def unaccelerate(obj: Any) -> Any:
    """Undo `accelerate` on the object that it returned, and return that: its class and its U-Net's forward are its own.

    An object that is not accelerated stays as it is.

    Raises:
        TypeError: it is neither a pipeline around a UNet2DConditionModel nor that module.
    """
    if _is_conditional(obj):
        _release(unwrapped(obj))
        return obj
    if not takes(obj):
        raise TypeError(f"obj is a {type(obj).__name__}, must be a pipeline around a UNet2DConditionModel, or that")
    for name, unet in _unets(obj).items():
        _release(unwrapped(unet))
        state = obj.__dict__.get("_fastddpm")
        if state is not None and name in state.compiled:
            obj.__dict__[name] = state.compiled[name]
    if isinstance(obj, _Accelerated):
        obj.__dict__.pop("_fastddpm", None)
        obj.__class__ = type(obj).__mro__[2]
    return obj


class _State:
    """What an accelerated pipeline holds. A copy starts anew, with the same options.

    Attributes:
        options: of `accelerate`.
        inplace: whether U-Nets are changed themselves.
        compiled: what `torch.compile` made of a U-Net, by the name of the component.
    """

    def __init__(self, options: Options, inplace: bool) -> None:
        self.options, self.inplace = options, inplace
        self.compiled: dict[str, Any] = {}
        self._samplers = Samplers()
        self._logged: set[str] = set()

    def follow(self, pipe: Any) -> None:
        """Take over the forward of the U-Nets that the pipeline has now."""
        for name, unet in _unets(pipe).items():
            module = unwrapped(unet)
            if module is not unet:
                self.compiled[name] = unet
                self._log(f"{name} is compiled by torch.compile, and runs without that")
            if not isinstance(vars(module).get("forward"), Forward):
                module = _taken(module, self.options, self.inplace)
            if module is not unet:
                pipe.__dict__[name] = module

    def loop(self, pipe: Any, arguments: dict[str, Any] | None) -> Loop | None:
        """Return the loop of a call that is taken over, or None."""
        how = pipeline_of(type(pipe).__mro__[2])
        unet = getattr(pipe, "unet", None)
        forward = None if unet is None else vars(unet).get("forward")
        if how is None or arguments is None or not self.options.loop or not isinstance(forward, Forward):
            return None
        try:
            return Loop(pipe, how, forward, self._samplers, arguments)
        except Unsupported as error:
            forward.keeps_loop(str(error))
            return None

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("%s", reason)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "inplace": self.inplace}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["inplace"])  # type: ignore[misc]


class _Accelerated:
    """What the classes of accelerated pipelines have beside their library's."""

    _fastddpm: _State

    def _accelerated_call(self: Any, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.__dict__.get("_fastddpm")
        if state is None:  # a pipeline that the class itself made
            state = self.__dict__["_fastddpm"] = _State(Options(), inplace=False)
        state.follow(self)
        for unet in _unets(self).values():
            forward = vars(unet).get("forward")
            if isinstance(forward, Forward):
                forward.begin()
        loop = state.loop(self, _arguments(base, self, args, kwargs))
        if loop is not None:
            self.__dict__["_loop"] = loop
            try:
                with loop.watched():
                    return base(self, *args, **kwargs)
            except KeepLoop as error:
                loop.give_up(str(error))
            finally:
                self.__dict__.pop("_loop", None)
        return base(self, *args, **kwargs)

    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        bar = super().progress_bar(*args, **kwargs)  # type: ignore[misc]
        if (loop := self.__dict__.get("_loop")) is not None:
            loop.noted_bar(bar)
        return bar

    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        latents = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        if (loop := self.__dict__.get("_loop")) is not None:
            loop.noted_latents(latents)
        return latents

    def prepare_mask_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().prepare_mask_latents(*args, **kwargs)  # type: ignore[misc]
        if (loop := self.__dict__.get("_loop")) is not None:
            loop.noted_mask(found[0])
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made, (type(self).__mro__[2],), dict(self.__dict__)


def _made(kind: type) -> Any:
    cls = _class_of(kind)
    return cls.__new__(cls)


@functools.cache
def _class_of(kind: type) -> Any:
    """Return the accelerated class of a pipeline's class; it has its name and module, which diffusers saves."""
    if issubclass(kind, _Accelerated):
        return kind
    base = kind.__call__  # type: ignore[operator]

    @functools.wraps(base)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._accelerated_call(base, args, kwargs)

    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__call__": call}
    return type(kind.__name__, (_Accelerated, kind), own)


def _arguments(base: Any, *given: Any) -> dict[str, Any] | None:
    """Return the arguments of a call by name, with defaults; None where they do not fit, which the call will say."""
    pipe, args, kwargs = given
    try:
        bound = inspect.signature(base).bind(pipe, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def _taken(unet: nn.Module, options: Options, inplace: bool) -> nn.Module:
    """Return the module, or a copy that shares all of its parts, with our forward.

    Raises:
        ValueError: its forward was replaced before, or it cannot be prepared and `allow_general` is False.
    """
    before = vars(unet).get("forward")
    module = unet if inplace else copy.copy(unet)
    if isinstance(before, Forward):
        module.__dict__.pop("forward")
    elif before is not None:
        reason = "unet.forward has been replaced, such as by offloading; accelerate first"
        if not options.allow_general:
            raise ValueError(reason)
        _log.warning("%s: it runs as it is", reason)
        return unet
    forward = Forward(module, options)
    module.__dict__["forward"] = forward
    if not options.allow_general:
        try:
            forward.prepared()
        except Unsupported as error:
            if inplace:
                _release(module)
            raise ValueError(str(error)) from None
    return module


def _release(unet: nn.Module) -> None:
    """Give a module its own forward back, also where hooks have been put around ours."""
    for name in ("forward", "_old_forward"):
        if isinstance(vars(unet).get(name), Forward):
            if name == "forward":
                unet.__dict__.pop(name)
            else:
                unet.__dict__[name] = type(unet).forward.__get__(unet)


def _unets(pipe: Any) -> dict[str, Any]:
    """Return the U-Nets of a pipeline by the names of its components."""
    names = [name for name in getattr(pipe, "config", {}) if not name.startswith("_")]
    found = {name: pipe.__dict__.get(name) for name in names}
    return {name: part for name, part in found.items() if _is_conditional(part)}


def _is_conditional(obj: Any) -> bool:
    return isinstance(obj, nn.Module) and _derives(unwrapped(obj), "UNet2DConditionModel")


def _is_pipeline(obj: Any) -> bool:
    return _derives(obj, "DiffusionPipeline")


def _derives(obj: Any, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == "diffusers" for cls in type(obj).__mro__)
