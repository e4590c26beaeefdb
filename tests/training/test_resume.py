"""A run that is killed, or cut into processes, is the run that it would have been."""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastddpm.training import read_log

# A short run with everything that has a state: dropout, importance-sampled timesteps, accumulation, two averages, a
# Dataset that draws random numbers, records that fall between checkpoints. argv: folder, dropout, step to die after.
RUN = """
import os, signal, sys
import torch
from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, UNet

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 11
    def __getitem__(self, index):
        return (torch.linspace(-1, 1, 64).view(1, 8, 8) * index / 11 + 0.1 * torch.randn(1, 8, 8)).clamp(-1, 1)

folder, dropout, last = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
unet = UNet(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, dropout=dropout,
)
run = Trainer(
    GaussianDiffusion(unet, NoiseSchedule.cosine(8), timestep_sampling="importance"), Data(), results_folder=folder,
    train_num_steps=20, train_batch_size=4, gradient_accumulate_every=2, train_lr=1e-2, augment_horizontal_flip=True,
    ema_decay=(0.9, 0.99), log_every=3, save_every=4, sample_every=100, num_inference_steps=2, num_workers=0,
    device="cpu" if torch.accelerator.is_available() else None, tensorboard=False, progress=False, resume=True,
)
after_step = run._after_step
def dies(*arguments):
    after_step(*arguments)
    if run.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
run._after_step = dies
run.train()
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(RUN)
    return path


def run_here(script: Path, folder: Path, dropout: float) -> None:
    """The script in this process, on one thread, as in the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), str(folder), str(dropout), "0"])
            runpy.run_path(str(script))
    finally:
        torch.set_num_threads(threads)


def launch(script: Path, folder: Path, dropout: float, last: int = 0, processes: int = 1) -> int:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(script), str(folder), str(dropout), str(last)]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=300, capture_output=True, text=True)
    assert last or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def final(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / "step-0000020").glob("*.safetensors"))
    return {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_log(folder / "log.jsonl")]


def test_killed_at_a_random_step_and_resumed_it_ends_the_same(script: Path, tmp_path: Path) -> None:
    run_here(script, tmp_path / "whole", 0.2)
    last = random.Random(os.environ.get("FASTDDPM_KILL_SEED", "8")).randrange(5, 20)
    assert launch(script, tmp_path / "killed", 0.2, last) == -signal.SIGKILL
    run_here(script, tmp_path / "killed", 0.2)
    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert {name.split()[0] for name in whole} == {"diffusion", "ema-0", "ema-1"}
    assert whole.keys() == killed.keys()
    assert all(killed[name].equal(value) for name, value in whole.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_are_one_with_the_same_batch(script: Path, tmp_path: Path) -> None:
    run_here(script, tmp_path / "one", 0.0)
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(script, two, 0.0, 10, processes=2) != 0  # killed, after the checkpoint of step 8
    launch(script, two, 0.0, processes=2)
    assert [step for step, *_ in losses(two)] == [3, 6, 9, 12, 15, 18, 20]
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(two), losses(one), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    for name, value in final(one).items():
        torch.testing.assert_close(final(two)[name], value, rtol=1e-3, atol=1e-4)
