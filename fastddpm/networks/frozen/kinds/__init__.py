"""The kinds of U-Net that can be frozen: one folder per library, found through `KINDS`.

To add a kind, write a folder beside `unet/` and `lucidrains/` and name its blueprint in `KINDS`. The folder holds:

- `blueprint.py`: a `Blueprint`, which says what the U-Net is. `takes` recognises it by its class, by name where the
  library need not be imported. `why_not` names a layer that it could not run. `embeddings` are those of time and
  labels apart, as an `Embeddings`. `time_projections` joins the projections of all blocks. `builder` is the next class.
  A kind of another library sets `foreign`: it is compared with its own forward before it is used.
- `lowering.py`: a `Builder` whose `lower` walks the layers in the order of the forward and emits their instructions.
- `instructions.py`, only where a layer is not in `frozen.instructions` yet.

Nothing outside of the folder changes. `tests/networks/test_frozen.py` takes a new kind by a function that makes its
networks and one that evaluates them: every test there then holds for it.
"""

from __future__ import annotations

from fastddpm.networks.frozen.blueprint import Blueprint
from fastddpm.networks.frozen.kinds.lucidrains.blueprint import (
    ClassConditionalBlueprint,
    LucidrainsBlueprint,
    RepaintBlueprint,
    SequenceBlueprint,
)
from fastddpm.networks.frozen.kinds.unet.blueprint import UNetBlueprint

KINDS: tuple[type[Blueprint], ...] = (
    UNetBlueprint,
    LucidrainsBlueprint,
    ClassConditionalBlueprint,
    RepaintBlueprint,
    SequenceBlueprint,
)


def blueprint_of(model: object) -> type[Blueprint] | None:
    """Return the kind of U-Net that a model is of, by its class, or None."""
    return next((kind for kind in KINDS if kind.takes(model)), None)
