"""Files that are no U-Net's: errors name them, and nothing in them is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from unets import SMALL

from fastddpm.networks.unet.files import OLD_WEIGHTS_FILE, WEIGHTS_FILE
from fastddpm.networks.unet.model import UNet


class Harmful:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bad_files(tmp_path: Path) -> None:
    weights, config = tmp_path / WEIGHTS_FILE, tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)
    unet = UNet(**SMALL)
    unet.save_pretrained(tmp_path)
    state = load_file(weights)

    del state["conv_in.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(4)
    save_file(state, weights)
    message = (
        rf"{WEIGHTS_FILE} does not fit its config.json; missing: conv_in.bias; "
        r"unexpected: extra.weight; of another shape: conv_out.bias$"
    )
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)

    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE} cannot be read: SafetensorError: [^\n]*$"):
        UNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"has neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE}"):
        UNet.from_pretrained(tmp_path)

    torch.save({"conv_in.bias": Harmful(tmp_path / "harm")}, tmp_path / OLD_WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"{OLD_WEIGHTS_FILE} cannot be read: [^\n]*$"):
        UNet.from_pretrained(tmp_path)
    assert not (tmp_path / "harm").exists()
    (tmp_path / OLD_WEIGHTS_FILE).write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=rf"{OLD_WEIGHTS_FILE} cannot be read: [^\n]*$"):
        UNet.from_pretrained(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / OLD_WEIGHTS_FILE)
    with pytest.raises(ValueError, match="does not hold a dictionary of tensors"):
        UNet.from_pretrained(tmp_path)

    config.write_text(json.dumps(unet.config.to_dict() | {"act_fn": "tanh"}))
    with pytest.raises(ValueError, match=r"config\.json: act_fn is 'tanh', must be one of 'silu', 'swish'"):
        UNet.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)
