"""Parameters of which a few run always, and all with --long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(count: int, values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters; those after the first `count` are marked long."""
    return [pytest.param(v, marks=[pytest.mark.long] * (i >= count)) for i, v in enumerate(values)]
