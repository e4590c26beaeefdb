"""Share the code of all accelerated diffusions, which replace only the sampling of the original object."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastddpm.interop.lucidrains.loop_network import LoopNetwork
from fastddpm.interop.lucidrains.models import LIBRARY
from fastddpm.interop.lucidrains.run import Drawing, Options, Samplers, Traits, Variant
from fastddpm.interop.shared import kind_of
from fastddpm.process.tables import StepTable
from fastddpm.sampling.sampler import Sampler

_log = logging.getLogger(__name__)

# The methods that the library's loops call. A diffusion that overrides one samples differently from `Sampler`.
_PARTS = (
    *("sample", "p_sample_loop", "ddim_sample", "interpolate", "sample_using_dpmpp"),
    *("p_sample", "p_mean_variance", "model_predictions", "q_posterior", "q_sample"),
    *("predict_start_from_noise", "predict_noise_from_start", "predict_start_from_v"),
    *("preconditioned_network_forward", "sample_schedule", "c_skip", "c_out", "c_in", "c_noise"),
)
PLAIN = Variant()


def base_of(diffusion: Any, known: Collection[tuple[str, str]]) -> type | None:
    """Return the first class of an object that is in `known`, by module and name; None if there is none."""
    for base in type(diffusion).__mro__:
        library, _, module = base.__module__.partition(".")
        if library == LIBRARY and (module, base.__name__) in known:
            return base
    return None


def _is_librarys(function: Any) -> bool:
    """Return whether a function and its wrappers come from the library or from torch. None counts as such."""
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] not in (LIBRARY, "torch"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


class Accelerated:
    """A diffusion that samples with `Sampler`.

    Attributes:
        diffusion: the original object.
        of: the classes that it accelerates, by module of the library and name.
        methods: those that replace the original's when it is accelerated in place.
        traits: how its class uses its network.
    """

    of: ClassVar[tuple[tuple[str, str], ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits()
    _usual = PLAIN  # the variant that sampling uses by default

    def __init__(self, diffusion: Any, options: Options) -> None:
        options.check_for(diffusion)
        samplers = Samplers(diffusion, options, self.traits)
        self.__dict__.update(diffusion=diffusion, options=options, _samplers=samplers, _told=set())

    # -- the object's own -----------------------------------------------------------------------------------------

    def to(self, *arguments: Any, **named: Any) -> Accelerated:
        """Move the original; sampling follows it unless the options name a device."""
        self.diffusion.to(*arguments, **named)
        return self

    def cuda(self, device: int | torch.device | None = None) -> Accelerated:
        """Move the original, like `to`."""
        self.diffusion.cuda(device)
        return self

    def cpu(self) -> Accelerated:
        """Move the original, like `to`."""
        return self.to("cpu")

    def train(self, mode: bool = True) -> Accelerated:
        """Set the mode of the original."""
        self.diffusion.train(mode)
        return self

    def eval(self) -> Accelerated:
        """Set the mode of the original."""
        return self.train(False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return the training loss of the original."""
        return self.diffusion(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name == "diffusion":  # not there yet, while being copied
            raise AttributeError(name)
        return getattr(self.diffusion, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.diffusion, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.diffusion!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"diffusion": self.diffusion, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def check(self) -> None:
        """Prepare the default sampling, so that its errors are raised now; see `accelerate`."""
        self.check_parts()
        self._samplers.check(self._usual)

    @classmethod
    def own_parts(cls, diffusion: Any) -> list[str]:
        """Return the methods that sampling calls and that the class overrides or the object or class replaces."""
        base = base_of(diffusion, cls.of)
        given = {name: value for name, value in vars(diffusion).items() if name in _PARTS}
        own = [name for name, value in given.items() if not isinstance(getattr(value, "__self__", None), Accelerated)]
        for name in _PARTS:
            theirs = getattr(base, name, None)
            if getattr(type(diffusion), name, None) is not theirs or not _is_librarys(theirs):
                own.append(name)
        return list(dict.fromkeys(own))

    def check_parts(self) -> None:
        """Raise ValueError where a method that sampling calls is not the library's."""
        if own := self.own_parts(self.diffusion):
            raise ValueError(
                f"{kind_of(self.diffusion)} has its own {', '.join(own)}, which would not be called; must have those "
                f"of {LIBRARY}, or allow_general be True: its own loop runs then"
            )

    # -- sampling -------------------------------------------------------------------------------------------------

    def _walk(
        self,
        table: StepTable,
        draws: Sequence[bool],
        shape: tuple[int, ...],
        drawing: Mapping[str, Any],
        *,
        variant: Variant = PLAIN,
        start_of: Callable[[Drawing], Tensor] | None = None,
        labels: Tensor | None = None,
        all_states: bool = False,
        keep_start: bool = False,
        scales: tuple[float, float] | None = None,
        named: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return samples of `shape`, or all states [N, S + 1, ...]; also x_T, if it was drawn beforehand.

        Args:
            draws: for each row, whether the original draws noise.
            start_of: makes x_T from a drawing, where x_T is more than its first noise.
            named: further keyword arguments of the network.
        """
        self.check_parts()
        with self._samplers.lent(variant, scales, named) as sampler:
            draw = Drawing(drawing, self.options, self.traits.device(self.diffusion), sampler, tuple(shape))
            x = None
            if start_of is not None:
                x = start_of(draw)
            elif draw.by_torch or all_states or keep_start:
                x = draw.initial()
            return draw.walk(table, draws, x, labels=labels, all_states=all_states, whole=bool(named)), x

    def _own_loop(
        self, method: str, reason: str, drawing: Mapping[str, Any], *arguments: Any, variant: Variant = PLAIN,
        scales: tuple[float, float] | None = None, **named: Any,
    ) -> Any:  # fmt: skip
        """Return the result of the original's own method, run with our network; `reason` is logged once.

        Raises:
            ValueError: `allow_general` is False, or the call asks for noise that is not torch's.
        """
        if not self.options.allow_general:
            raise ValueError(
                f"{reason}, which no step table holds; must be without, or allow_general be True: the original "
                f"{method} runs then, with fastddpm's network"
            )
        unknown = [name for name in drawing if name not in ("noise", "progress")]
        if unknown or drawing.get("noise") not in (None, "torch"):
            raise ValueError(
                f"{(unknown or ['noise'])[0]} is given but {reason}: the original {method} runs, whose noise is torch's"
            )
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("%s: the original %s runs, with fastddpm's network", reason, method)
        with self._samplers.lent(variant, scales) as sampler:
            shadow = shadow_of(self.diffusion, self.traits.network, sampler)
            return getattr(shadow, method)(*arguments, **named)


def shadow_of(diffusion: Any, network: str, sampler: Sampler) -> Any:
    """Return a copy of a diffusion with the sampler's network, without our methods; all else is shared."""
    shadow = copy.copy(diffusion)
    vars(shadow)["_modules"] = dict(vars(diffusion)["_modules"])
    for name, value in list(vars(shadow).items()):
        if isinstance(getattr(value, "__self__", None), Accelerated):
            del vars(shadow)[name]
    vars(shadow)["_modules"][network] = LoopNetwork(getattr(diffusion, network), sampler, len(diffusion.betas))
    return shadow
