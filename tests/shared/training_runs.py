"""Runs of a Trainer in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fastddpm.training.trainer", "fastddpm.interop.pretrained", "accelerate.utils"])


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Eleven images whose reading draws random numbers."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Tensor:
        return (torch.linspace(-1, 1, 64).view(1, 8, 8) * index / 11 + 0.1 * torch.randn(1, 8, 8)).clamp(-1, 1)


def train(folder: Path, dropout: float, last: int = 0) -> None:
    """Run with everything that has a state, on one thread; die after step `last`.

    Dropout, importance-sampled timesteps, accumulation, two averages, a Dataset that draws, records between
    checkpoints.
    """
    from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, UNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, dropout=dropout,
    )  # fmt: skip
    run = Trainer(
        GaussianDiffusion(unet, NoiseSchedule.cosine(8), timestep_sampling="importance"), Noisy(),
        results_folder=folder, train_num_steps=20, train_batch_size=4, gradient_accumulate_every=2, train_lr=1e-2,
        augment_horizontal_flip=True, ema_decay=(0.9, 0.99), log_every=3, save_every=4, sample_every=100,
        num_inference_steps=2, num_workers=0, tensorboard=False, progress=False, resume=True,
        device="cpu" if torch.accelerator.is_available() else None,
    )  # fmt: skip
    after_step = run._after_step

    def dies(*arguments: Any) -> None:
        after_step(*arguments)
        if run.step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    run._after_step = dies  # type: ignore[method-assign]
    run.train()


def _child(environment: dict[str, str], function: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    function(*arguments)


def launch(function: Any, *arguments: Any, processes: int = 1) -> list[int | None]:
    """Call a function in new processes that know each other as torchrun's do; return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        children.append(_context.Process(target=_child, args=(environment, function, arguments)))
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=500)
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def share_history(folder: Path) -> None:
    """Update importance sampling by this process' half of each batch in `folder`."""
    import torch.distributed as dist

    from fastddpm.training.objective.timestep_sampling import TimestepSampler

    dist.init_process_group("gloo")
    rank, sampler = dist.get_rank(), TimestepSampler("importance", 3)
    for t, losses in torch.load(folder / "batch", weights_only=True):
        sampler.update(t[rank * 9 :][:9], losses[rank * 9 :][:9])
    torch.save(sampler.state_dict(), folder / str(rank))
    dist.destroy_process_group()
