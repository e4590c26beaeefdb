"""What `lucidrains` needs to sample: options, samplers, noise."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor, nn

from fastddpm.common import checks
from fastddpm.interop.lucidrains.models import (
    GuidedPredictor,
    Mixture,
    Predictor,
    cast_embeddings,
    fuse_norms,
    verify_fused,
)
from fastddpm.interop.lucidrains.tables import prediction_type
from fastddpm.interop.shared import StepNoise, check_noise
from fastddpm.networks.frozen import why_not
from fastddpm.networks.weights import Follower
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """The options of `lucidrains.accelerate`."""

    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    batch_size: int | str | None = None
    progress: bool = True
    noise: str = "philox"
    freeze: bool | None = None
    fuse_norms: bool | None = None
    channels_last: bool = False
    allow_general: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, allow_general: bool) -> Options:
        """Raises TypeError if an option is not known, ValueError if it is out of range."""
        names = [field.name for field in fields(cls) if field.name != "allow_general"]
        for name in given:
            if name not in names:
                raise TypeError(f"{name} is no option, must be one of {', '.join(names)}")
        options = cls(**given, allow_general=allow_general)
        check_noise(options.noise)
        checks.batch_size(options.batch_size)
        return options

    def check_for(self, diffusion: Any) -> None:
        """Raises ValueError if an option is not for such a diffusion."""
        if self.channels_last and hasattr(diffusion, "seq_length"):
            raise ValueError("channels_last is True but the diffusion is one-dimensional; must be False")


class Variant(NamedTuple):
    """What of a call a sampler is made for.

    Attributes:
        clip: whether x0 is clipped.
        labelled: whether labels are given.
        guided, rescaled: whether guidance is computed, and the standard deviation brought back.
        conditioned: whether a self-conditioned network is given the x0 before.
    """

    clip: bool = True
    labelled: bool = False
    guided: bool = False
    rescaled: bool = False
    conditioned: bool = True


@dataclass(frozen=True)
class Traits:
    """How a class of the library uses its network.

    Attributes:
        network: the attribute that is the network.
        by_name: see `Predictor`.
        predicts: what the network, as it is wrapped, predicts, in this package's words.
        variance_type: "learned_range" where its output has a second half about the variance.
        weighted: whether it predicts noise, x0 and the weights of both.
        table: makes the table that a sampler is made for, where the diffusion has no betas.
    """

    network: str = "model"
    by_name: bool = False
    predicts: Callable[[Any], str] = prediction_type
    variance_type: str = "fixed_small"
    weighted: bool = False
    table: Callable[[Any], StepTable] | None = None

    def device(self, diffusion: Any) -> torch.device:
        """Return where a diffusion draws its noise."""
        betas = getattr(diffusion, "betas", None)
        return next(self.of(diffusion).parameters()).device if betas is None else betas.device

    def of(self, diffusion: Any) -> Any:
        """Return the network."""
        return getattr(diffusion, self.network)


class Samplers:
    """The samplers of a diffusion, made when they are needed and made anew when the network is another one.

    Args:
        diffusion: the original object.
        options: how it is sampled.
        traits: of its class.
    """

    def __init__(self, diffusion: Any, options: Options, traits: Traits) -> None:
        self._diffusion, self._options, self._traits = diffusion, options, traits
        self._held: dict[Variant, _Held] = {}
        self._lock = threading.RLock()

    @contextmanager
    def lent(
        self, variant: Variant, scales: tuple[float, float] | None, named: Mapping[str, Any] | None = None
    ) -> Iterator[Sampler]:
        """The sampler of a variant; with guidance scales, which it has one pair of, for one thread at a time.

        Inside, there are no gradients and no inference mode: what is kept for later calls must be of use outside. With
        arguments for the network by name it is made for this call alone.
        """
        with torch.inference_mode(False), torch.no_grad():
            if named:
                yield _Held(self._diffusion, self._options, variant, self._traits, named).sampler
                return
            with self._lock:
                held = self._held.get(variant)
                if held is None or not held.fits(self._diffusion, self._options):
                    held = self._held[variant] = _Held(self._diffusion, self._options, variant, self._traits)
                held.refresh()
                if scales is not None and variant.guided:
                    network: Any = held.sampler.model
                    network.set_scales(*scales)
                    yield held.sampler
                    return
            yield held.sampler

    def check(self, variant: Variant) -> None:
        """Makes the sampler of a variant, for the errors that this raises."""
        with self.lent(variant, None):
            pass


class _Held:
    """A sampler and what it was made of."""

    def __init__(
        self, diffusion: Any, options: Options, variant: Variant, traits: Traits,
        named: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._traits, self._named = traits, dict(named or {})
        self._device = torch.device(options.device or traits.device(diffusion))
        self._made_of = _identity(diffusion, options, traits)
        self._follower: Follower | None = None
        self._mixture: Mixture | None = None
        if options.freeze is not False and not self._named:
            reason = why_not(traits.of(diffusion), self._device)
            if options.backend == "reference":
                reason = "backend is 'reference', which runs a network as it is"
            if reason is None:
                self.sampler = self._frozen(diffusion, options, variant)
                if self.sampler.network.frozen is not None:
                    return
                reason = "its forward computes something else than was frozen"  # the log says how far it is from that
            if options.freeze:
                raise ValueError(
                    f"freeze is True but the diffusion's {traits.network} cannot be frozen: {reason}; must be None"
                )
        self.sampler = self._plain(diffusion, options, variant)

    def _frozen(self, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        model = self._traits.of(diffusion)
        if variant.labelled:
            model = GuidedPredictor(
                model, guided=variant.guided, rescaled=variant.rescaled, device=self._device, freeze=True
            )
        return self._sampler(model, diffusion, options, variant)

    def _plain(self, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        """The library's modules, some of them replaced."""

        def called(model: nn.Module, **guidance: bool) -> nn.Module:
            if not variant.labelled:
                return Predictor(model, by_name=self._traits.by_name, named=self._named)
            return GuidedPredictor(model, device=self._device, **{"guided": False, "rescaled": False, **guidance})

        model = self._traits.of(diffusion)
        if options.fuse_norms or (options.fuse_norms is None and self._device.type == "cuda"):
            fused, count = fuse_norms(model, options.backend)
            if count:
                verify_fused(called(model), called(fused), *_example(diffusion, variant, self._traits))
                model = fused
            elif options.fuse_norms:
                raise ValueError(
                    f"fuse_norms is True but the diffusion's model, a {type(model).__name__}, has no norms of "
                    "denoising_diffusion_pytorch; must be None or False"
                )
        if options.dtype is not None:
            model = cast_embeddings(model)
        predictor = network = called(model, guided=variant.guided, rescaled=variant.rescaled)
        if options.channels_last:
            network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        sampler = self._sampler(network, diffusion, options, variant)
        if isinstance(sampler.model, nn.Module) and sampler.model is not (self._mixture or predictor):
            copied: Any = sampler.model
            self._follower = Follower(predictor, copied.model if isinstance(copied, Mixture) else copied)
        return sampler

    def _sampler(self, network: nn.Module, diffusion: Any, options: Options, variant: Variant) -> Sampler:
        traits = self._traits
        if traits.weighted:
            network = self._mixture = Mixture(network, diffusion, self._device, freeze=options.freeze is not False)
        settings: dict[str, Any] = {
            "clip_sample": variant.clip,
            "dtype": options.dtype,
            "device": self._device,
            "backend": options.backend,
            "cuda_graph": False if self._named else options.cuda_graph,
            "self_condition": variant.conditioned and bool(getattr(diffusion, "self_condition", False)),
        }
        if traits.table is not None:
            return Sampler(network, traits.table(diffusion), **settings)
        return Sampler(
            network,
            NoiseSchedule.from_betas(diffusion.betas),
            "ddpm",
            prediction_type=traits.predicts(diffusion),
            variance_type=traits.variance_type,
            convention="denoising_diffusion_pytorch",
            **settings,
        )

    def fits(self, diffusion: Any, options: Options) -> bool:
        """Whether the diffusion is still what it was made of."""
        frozen = self.sampler.network.frozen is not None
        if frozen and why_not(self._traits.of(diffusion), self._device) is not None:
            return False
        return self._made_of == _identity(diffusion, options, self._traits)

    def refresh(self) -> None:
        """Takes over the weights where the sampler's network is a copy and they have changed; others do so alone."""
        if self._follower is not None:
            self._follower.refresh()
        if isinstance(self.sampler.model, Mixture):
            self.sampler.model.refresh()


class Drawing:
    """One call: its noise and what else was asked for by name.

    Args:
        given: noise, seed and progress, see `AcceleratedDiffusion`.
        options: where they are not given.
        device: of the original, where torch's generator is asked.
        sampler: what samples.
        shape: [N, ...] of the samples.
    """

    def __init__(
        self, given: Mapping[str, Any], options: Options, device: torch.device, sampler: Sampler, shape: tuple[int, ...]
    ) -> None:
        for name in given:
            if name not in ("noise", "seed", "progress"):
                raise TypeError(f"{name} is no argument; beside the original's there are noise, seed and progress")
        source, seed = given.get("noise"), given.get("seed")
        self.by_torch = check_noise(options.noise if source is None else source) == "torch"
        progress = given.get("progress")
        self._progress = options.progress if progress is None else bool(progress)
        self._batch_size, self._sampler, self._shape = options.batch_size, sampler, shape
        self._device = device
        count = shape[0]
        if self.by_torch and seed is not None:
            raise ValueError(f"seed is {seed} but noise is 'torch', which torch.manual_seed seeds")
        if self.by_torch and isinstance(self._batch_size, int) and self._batch_size < count:
            raise ValueError(
                f"batch_size is {self._batch_size} for {count} samples but noise is 'torch', which is drawn for all of "
                "them at once; must be None or 'auto', or noise 'philox'"
            )
        if seed is None and not self.by_torch:
            seed = int(torch.randint(2**62, ()))
        self._seed = 0 if seed is None else seed

    def initial(self, index: int = 0, *, stream: int = philox.STREAM_INITIAL) -> Tensor:
        """Noise of the samples' shape, where they are sampled: of the `index`-th batch, or what torch draws next."""
        if self.by_torch:
            return self._draw().to(self._sampler.device)
        count = self._shape[0]
        keys = philox.sample_keys(
            [self._seed] * count, range(index * count, (index + 1) * count), device=self._sampler.device
        )
        return philox.normal(keys, self._shape[1:], step=0, stream=stream, backend=self._sampler.backend)

    def walk(
        self,
        table: StepTable,
        draws: Sequence[bool],
        x: Tensor | None,
        *,
        labels: Tensor | None = None,
        start: int = 0,
        all_states: bool = False,
        whole: bool = False,
    ) -> Tensor:
        """The samples at the end of the table, float32 [N, ...]; or x and all states after it, [N, S + 1, ...].

        Args:
            table: of the sampler.
            draws: for every row whether the original draws noise, used or not.
            x: before the row `start`, where it is not to be drawn.
            labels: int64 [N], or None.
            start: the first row.
            all_states: which of both is returned.
            whole: whether all samples must be drawn at once.

        Raises:
            ValueError: they must, and the option `batch_size` is less.
        """
        size = self._batch_size
        if whole and isinstance(size, int) and size < self._shape[0]:
            raise ValueError(
                f"batch_size is {size} for {self._shape[0]} samples but model_forward_kwargs are given, which are for "
                "all of them; must be None or 'auto'"
            )
        arguments: dict[str, Any] = {
            "shape": self._shape[1:],
            "x_T": x,
            "table": table,
            "start": start,
            "class_labels": labels,
            "batch_size": None if whole else size,
            "progress": self._progress,
        }
        noise = None
        if self.by_torch:
            noise = arguments["noise"] = StepNoise(draws, self._draw, start)
        else:
            arguments["seed"] = self._seed
        if all_states and x is not None:
            states = self._sampler.sample(len(x), return_trajectory=1, **arguments).x
            result = torch.cat([x[:, None], states.transpose(0, 1)], dim=1)
        else:
            result = self._sampler.sample(self._shape[0], **arguments)
        if noise is not None:
            noise.finish()
        return result

    def _draw(self) -> Tensor:
        return torch.randn(self._shape, device=self._device)


def _identity(diffusion: Any, options: Options, traits: Traits) -> tuple[Any, ...]:
    """What may not change for a sampler to stay right: the device, and which parameters there are in which dtype."""
    network = traits.of(diffusion)
    every = itertools.chain(network.parameters(), network.buffers())
    tensors = tuple((id(tensor), tensor.dtype, tensor.device) for tensor in every)
    return (torch.device(options.device or traits.device(diffusion)), id(network), *tensors)


def _example(diffusion: Any, variant: Variant, traits: Traits) -> tuple[Any, ...]:
    """The shape of a sample, and what the network takes after x and t."""
    if hasattr(diffusion, "seq_length"):
        shape = (diffusion.channels, diffusion.seq_length)
        return (shape if diffusion.channel_first else shape[::-1],)
    size = diffusion.image_size
    shape = (diffusion.channels, *((size, size) if isinstance(size, int) else size))
    if variant.labelled:
        return shape, torch.zeros(1, dtype=torch.int64, device=traits.device(diffusion))
    return (shape,)
