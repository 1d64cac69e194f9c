"""Draws the contact sheet of the embedded model: ``python recipes/emoji/sheet.py docs/contact-sheet.png``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.cli.generate import embedded_defaults
from sfumato.hub import EMBEDDED_MODEL

PROMPTS = ("red apple", "grinning cat", "rocket", "blue heart", "pizza", "octopus", "strawberry", "sun", "mushroom", "hot beverage")
STYLES = ("3d", "flat", "noto", "line")
CELL, LABEL = 96, 18


def main(path: Path, model: Path = EMBEDDED_MODEL) -> None:
    """Makes one picture of each prompt in each style, the first seed, nothing chosen."""
    torch.set_num_threads(1)
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(model)
    sheet = Image.new("RGB", (LABEL * 3 + CELL * len(PROMPTS), LABEL + CELL * len(STYLES)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(PROMPTS):
        draw.text((LABEL * 3 + CELL * column + 4, 3), prompt, fill="black")
    for row, style in enumerate(STYLES):
        draw.text((4, LABEL + CELL * row + CELL // 2 - 6), style, fill="black")
        generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
        pictures = pipe([f"{p}, {style} style" for p in PROMPTS], generator=generators, **embedded_defaults()).images
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (LABEL * 3 + CELL * column, LABEL + CELL * row))
    sheet.save(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
