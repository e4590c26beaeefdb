"""Shared by the tests of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 3], ids=["one_thread", "three_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Native kernels on one thread, and on more than most shapes have work for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
