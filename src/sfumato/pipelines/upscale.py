"""Larger pictures by any image-to-image pipeline, in tiles that its denoiser was made for."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..media.image import plain
from .base import DiffusionPipeline
from .checks import is_number
from .tasks import ImageToImage


def upscale_by_tiles(
    pipe: DiffusionPipeline, image: Image.Image, prompt: str = "", *, factor: float = 2.0, tile: int = 1024, overlap: int = 128,
    strength: float = 0.3, **call: Any,
) -> Image.Image:  # fmt: skip
    """Enlarges a picture and paints detail into it, tile by tile (SDEdit on each, arXiv:2108.01073).

    Any family and any factor will do: the denoiser sees tiles only. Neighbouring tiles fade into each other over their overlap.

    Args:
        pipe: An image-to-image pipeline, with adapters or without; ``AutoPipelineForImage2Image.from_pipe`` makes one.
        image: The picture.
        prompt: What the picture shows, for all tiles.
        factor: How many times larger each edge becomes.
        tile, overlap: Edge of a tile and how far tiles overlap, in pixels; multiples of the pipeline's size unit.
        strength: How freely each tile is painted: 0.2 sharpens, 0.5 invents.
        **call: Further arguments of the pipeline's call, for every tile. ``control_image`` is cut into tiles as the picture is.

    Returns:
        The picture, ``factor`` times as wide and high, rounded to pixels.

    Raises:
        TypeError: ``pipe`` is no image-to-image pipeline.
        ValueError: The sizes do not fit together.
    """
    if type(pipe.task) is not ImageToImage:
        remedy = "pass AutoPipelineForImage2Image.from_pipe(pipe)"
        raise TypeError(f"pipe is a {type(pipe).__name__}, which does {pipe.task.name}: {remedy}")
    run: Any = pipe
    unit = pipe.size_multiple
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % unit or value < unit:
            raise ValueError(f"{name}={value} must be a positive multiple of {unit} for {type(pipe).__name__}")
    if overlap * 2 > tile or not is_number(factor) or factor <= 0:
        raise ValueError(f"overlap={overlap} must be at most half of tile={tile}, and factor={factor} a positive number")
    width, height = (round(edge * factor) for edge in image.size)
    whole = plain(image).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    steer = call.pop("control_image", None)
    steer = None if steer is None else plain(steer).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    canvas, weights = np.zeros((height, width, 3), np.float32), np.zeros((height, width, 1), np.float32)
    boxes = [(x, y) for y in _starts(height, tile, overlap) for x in _starts(width, tile, overlap)]
    for x, y in tqdm(boxes, desc="tiles", disable=pipe._progress.get("disable")):
        size = {"width": min(tile, -(-width // unit) * unit), "height": min(tile, -(-height // unit) * unit)}
        box = (x, y, min(x + size["width"], width), min(y + size["height"], height))
        options = call if steer is None else {**call, "control_image": steer.crop(box)}
        made = run(prompt=prompt, image=whole.crop(box), strength=strength, output_type="np", **size, **options).images[0]
        piece = Image.fromarray((made * 255).round().astype(np.uint8)).resize((box[2] - x, box[3] - y), Image.Resampling.LANCZOS)
        fade = _ramp(box[3] - y, overlap)[:, None, None] * _ramp(box[2] - x, overlap)[None, :, None]
        canvas[y : box[3], x : box[2]] += np.asarray(piece, np.float32) * fade
        weights[y : box[3], x : box[2]] += fade
    return Image.fromarray((canvas / weights).round().clip(0, 255).astype(np.uint8))


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover ``length``, the last of which ends with it."""
    if length <= tile:
        return [0]
    step, last = tile - overlap, length - tile
    return [*range(0, last, step), last]


def _ramp(length: int, overlap: int) -> np.ndarray:
    """Weights that rise at the one end and fall at the other; never zero."""
    steps = np.arange(1, length + 1, dtype=np.float32)
    return np.minimum(np.minimum(steps, steps[::-1]) / (overlap + 1), 1.0)
