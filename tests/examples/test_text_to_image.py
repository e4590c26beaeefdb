"""`examples/emoji.py` and `train_text_to_image.py`: which emoji are drawn and held out; figures tell good from bad."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
LINES = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                                  ; fully-qualified     # 😀 E1.0 grinning face
263A                                                   ; unqualified         # ☺ E0.6 smiling face
# subgroup: person-role
1F9D1 1F3FF 200D 2695 FE0F ; fully-qualified # 🧑🏿‍⚕️ E12.1 health worker: dark skin tone
1F9D1 1F3FD 200D 2695 FE0F ; fully-qualified # 🧑🏽‍⚕️ E12.1 health worker: medium skin tone
1F9D1 1F3FE 200D 2695 FE0F ; fully-qualified # 🧑🏾‍⚕️ E12.1 health worker: medium-dark skin tone
# subgroup: family
1F46B 1F3FF 200D 1F3FB ; fully-qualified # x E12.0 woman and man holding hands: dark skin tone, light skin tone
# subgroup: country-flag
1F1E6 1F1E8 ; fully-qualified # 🇦🇨 E2.0 flag: Ascension Island
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        patch.setattr(sys, "argv", ["train_text_to_image.py"])
        return importlib.import_module("train_text_to_image")


def test_which_emoji_are_drawn(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "emoji-test.txt").write_text(LINES, encoding="utf-8")
    listed = list(example.emoji.listed(tmp_path / "emoji-test.txt"))
    assert [each.name for each in listed] == ["grinning face", "health worker: dark skin tone"]
    assert listed[1].text == "\U0001f9d1\U0001f3ff\u200d\u2695\ufe0f"


def test_words_of_held_out_names_stand_in_others(example: ModuleType) -> None:
    names = [f"{who} {what}" for who in ("man", "woman", "person") for what in ("running", "cook", "with ball")]
    names += ["unicorn", "of the"]
    chosen = example.emoji.split(names, share=0.3)
    assert 1 <= len(chosen) <= 4
    left = Counter(word for name in set(names) - chosen for word in example.emoji.words(name))
    assert all(left[word] >= 2 for name in chosen for word in example.emoji.words(name))
    assert chosen == example.emoji.split(names[::-1], share=0.3)


def test_figures_tell_good_from_bad(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    colours, kinds = ("red", "blue", "green", "black"), ("heart", "circle", "square", "star")
    everyone = [f"{colour} {kind}" for colour in colours for kind in kinds]
    everything = torch.randn(16, 3, 8, 8, generator=generator)
    names, real = everyone[::3], everything[::3]
    near = real + 0.1 * torch.randn(real.shape, generator=generator)
    good = example.compare(names, near, real, everyone, everything)
    assert good["words"]["drawn"] == 1
    assert good["words"]["chance"] == pytest.approx((1 + 6 / 2) / 16, abs=1e-3)  # itself, and six of one common word
    assert good["words"]["shuffled"] < 0.5
    assert good["own_picture"]["median_rank"] == 1
    bad = example.compare(names, near.roll(1, 0), real, everyone, everything)
    assert bad["words"]["drawn"] < 0.5
    assert bad["own_picture"]["median_rank"] > 1
