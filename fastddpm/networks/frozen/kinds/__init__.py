"""The kinds of U-Net that can be frozen: one folder per library, found through `KINDS`.

To add a kind, write a folder beside `unet/` and `lucidrains/` and name its blueprint in `KINDS`. The folder holds:

- `blueprint.py`: a `Blueprint`, which describes the U-Net. `takes` recognises it by its class, by name if that saves
  importing the library. `why_not` names a layer that cannot be frozen. `embeddings` returns those of time and labels
  separately, as an `Embeddings`. `time_projections` joins the projections of all blocks. `builder` is the next class.
  A kind of another library sets `foreign`: its frozen network is compared with its own forward before use.
- `lowering.py`: a `Builder` whose `lower` walks the layers in the order of the forward and emits their instructions.
- `instructions.py`: only if `frozen.instructions` lacks a layer.

Nothing outside the folder changes. To test a new kind, give `tests/networks/test_frozen.py` a function that makes its
networks and one that evaluates them: every test there then runs for it.
"""

from __future__ import annotations

from fastddpm.networks.frozen.blueprint import Blueprint
from fastddpm.networks.frozen.kinds.condition.blueprint import ConditionBlueprint
from fastddpm.networks.frozen.kinds.edm.blueprint import EDMBlueprint
from fastddpm.networks.frozen.kinds.lucidrains.blueprint import (
    ClassConditionalBlueprint,
    LucidrainsBlueprint,
    RepaintBlueprint,
    SequenceBlueprint,
)
from fastddpm.networks.frozen.kinds.monai.blueprint import MonaiBlueprint
from fastddpm.networks.frozen.kinds.policies.blueprint import LeRobotBlueprint, PolicyBlueprint
from fastddpm.networks.frozen.kinds.unet.blueprint import UNetBlueprint

KINDS: tuple[type[Blueprint], ...] = (
    UNetBlueprint,
    LucidrainsBlueprint,
    ClassConditionalBlueprint,
    RepaintBlueprint,
    SequenceBlueprint,
    ConditionBlueprint,
    EDMBlueprint,
    MonaiBlueprint,
    PolicyBlueprint,
    LeRobotBlueprint,
)


def blueprint_of(model: object) -> type[Blueprint] | None:
    """Return the kind of U-Net that a model is, by its class, or None."""
    return next((kind for kind in KINDS if kind.takes(model)), None)
