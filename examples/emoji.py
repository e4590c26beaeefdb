"""Small pictures with captions, offline: the emoji of a font, with the names that Unicode gives them.

    apt-get install fonts-noto-color-emoji unicode-data
    python examples/emoji.py emoji              # writes emoji/train and emoji/held-out, each with metadata.jsonl

The font is Google's Noto Color Emoji (SIL Open Font License 1.1), the names are those of Unicode's `emoji-test.txt`
(Unicode License V3).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
GLYPH = 109  # the one size at which the font has its bitmaps
SIZE = 32
HELD_OUT = 0.1  # of the captions
# Flags and buttons with letters must be known by heart: nothing in their names says what they look like.
LEFT_OUT = ("country-flag", "subdivision-flag", "alphanum", "keycap")
# Of the five tones that people are drawn in, two: they are a third of the pictures then, not two thirds.
TONES = ("light skin tone", "dark skin tone")
_TONE = re.compile(r"(?:medium-light|medium-dark|medium|light|dark) skin tone")
_LINE = re.compile(r"(?P<code>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (?P<name>.+)")


class Emoji(NamedTuple):
    """A sequence of characters, its name and the subgroup that Unicode puts it in."""

    text: str
    name: str
    subgroup: str


def listed(path: Path = NAMES) -> Iterator[Emoji]:
    """Yield the emoji of `emoji-test.txt` that are drawn here."""
    subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        match = _LINE.fullmatch(line)
        if match is None or subgroup in LEFT_OUT:
            continue
        tones = _TONE.findall(match["name"])
        if len(tones) <= 1 and all(tone in TONES for tone in tones):
            yield Emoji("".join(chr(int(code, 16)) for code in match["code"].split()), match["name"], subgroup)


def pictures(emoji: list[Emoji], font_path: Path = FONT, size: int = SIZE) -> Iterator[tuple[Emoji, Image.Image]]:
    """Yield the emoji that the font has as one glyph, with their pictures on white, `size` pixels a side."""
    if not features.check("raqm"):
        raise RuntimeError("Pillow has no raqm, which composes emoji of several characters")
    font = ImageFont.truetype(str(font_path), GLYPH, layout_engine=ImageFont.Layout.RAQM)
    width = font.getlength("\N{GRINNING FACE}")
    for each in emoji:
        if font.getlength(each.text) != width:  # several glyphs, or none
            continue
        left, top, right, bottom = font.getbbox(each.text)
        side = round(width)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        place = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
        ImageDraw.Draw(canvas).text(place, each.text, font=font, embedded_color=True)
        white = Image.new("RGBA", canvas.size, "white")
        yield each, Image.alpha_composite(white, canvas).convert("RGB").resize((size, size), Image.Resampling.BOX)


def words(caption: str) -> set[str]:
    """Return the words of a caption that name something."""
    return set(re.findall(r"\w+", caption.lower())) - {"with", "and", "in", "of", "on", "the", "a", "no", "for"}


def split(names: list[str], share: float = HELD_OUT) -> set[str]:
    """Return the captions to hold out: a share of them, each of whose words still stands in two others."""
    left = Counter(word for name in names for word in words(name))
    chosen: set[str] = set()
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(chosen) < share * len(names) and words(name) and all(left[word] > 2 for word in words(name)):
            chosen.add(name)
            left.subtract(words(name))
    return chosen


def write(folder: Path, font: Path = FONT, names: Path = NAMES) -> None:
    """Write the pictures and their captions to `folder`/train and `folder`/held-out."""
    drawn = list(pictures(list(listed(names)), font))
    held_out = split([emoji.name for emoji, _ in drawn])
    rows: dict[str, list[str]] = {"train": [], "held-out": []}
    for emoji, picture in drawn:
        part = "held-out" if emoji.name in held_out else "train"
        file = "-".join(f"{ord(character):x}" for character in emoji.text) + ".png"
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / file)
        rows[part].append(json.dumps({"file_name": file, "text": emoji.name}, ensure_ascii=False))
    for part, lines in rows.items():
        (folder / part / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--font", type=Path, default=FONT, help="(default: %(default)s)")
    parser.add_argument("--names", type=Path, default=NAMES, help="(default: %(default)s)")
    options = parser.parse_args()
    write(options.folder, options.font, options.names)


if __name__ == "__main__":
    main()
