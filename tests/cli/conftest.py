"""What the tests of the commands share: an empty working folder, tiny models, and how a refusal must look."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unets import TINY

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The config of a U-Net that costs nothing, for 8x8 grey images without classes."""
    return TINY


@pytest.fixture
def model() -> str:
    """A pipeline folder of such a U-Net."""
    torch.manual_seed(0)
    save_pretrained("model", UNet(**TINY), NoiseSchedule.linear())
    return "model"


class Pooled(nn.Module):
    """Features of grey images of any size: 2 x 2 means."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), (2, 2)).flatten(1)


@pytest.fixture(scope="session")
def feature_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of features, as TorchScript."""
    path = tmp_path_factory.mktemp("network") / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated; such files exist
        torch.jit.save(torch.jit.script(Pooled()), path)
    return path


@pytest.fixture
def network(feature_network: Path) -> str:
    """The same in the working folder."""
    Path("net.pt").symlink_to(feature_network)
    return "net.pt"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail: exit code 2, one line on standard error, nothing printed or written."""

    def run(*arguments: str) -> str:
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        try:
            code: object = main(list(arguments))
        except SystemExit as stop:  # argparse
            code = stop.code
        printed = capsys.readouterr()
        assert code == 2
        lines = [line for line in printed.err.splitlines() if "━" not in line]  # bars may have been drawn before
        assert len(lines) == 1
        assert lines[0].startswith((f"fastddpm {arguments[0]}: error: ", "fastddpm: error: "))
        assert printed.out == ""
        assert sorted(Path().rglob("*")) == before
        return lines[0]

    return run
