"""Pictures in and out: loading from anywhere, grids, and PNG files that carry the recipe they were made with."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..files import write_atomically

if TYPE_CHECKING:
    import torch

RECIPE_KEY = "sfumato"
"""Name of the PNG text chunk that holds the recipe."""

TIMEOUT = 30.0
"""Seconds that a server may be silent while a picture is fetched."""


def load_image(
    image: str | Path | bytes | Image.Image | np.ndarray | torch.Tensor,
    convert_method: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """Loads a picture, turned upright as its EXIF data says.

    Args:
        image: A path, an ``http(s)://`` or ``data:`` URL, the bytes of a picture file, a PIL picture, an array ``(H, W)``,
            ``(H, W, C)`` or ``(1, H, W, C)``, or a tensor ``(C, H, W)`` or ``(1, C, H, W)``; arrays and tensors hold ``uint8``
            or floats in 0..1.
        convert_method: Called with the upright picture in its own mode, for example ``lambda image: image.convert("L")`` for
            a mask. Without it the result is RGB: transparency is laid over white, 16 bits become 8.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: A URL cannot be fetched.
        ValueError: What is found is not a picture, or has a wrong shape or range.
        TypeError: ``image`` is of another type.
    """
    picture = _open(image)
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    return opaque(picture) if convert_method is None else convert_method(picture)


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return array_to_pil(image)
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        # (..., C, H, W) -> (..., H, W, C)
        array = image.detach().cpu().movedim(-3, -1) if image.dim() > 2 else image.detach().cpu()
        return array_to_pil((array.float() if array.is_floating_point() else array).numpy())
    if isinstance(image, (bytes, bytearray)):
        return _decode(bytes(image), "the bytes given")
    if not isinstance(image, (str, Path)):
        expected = "a path, a URL, bytes, a PIL picture, a numpy array or a torch tensor"
        raise TypeError(f"image is a {type(image).__name__}: expected {expected}")
    name = str(image)
    if name.startswith(("http://", "https://")):
        request = urllib.request.Request(name, headers={"User-Agent": "sfumato"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return _decode(answer.read(), name)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"could not fetch {name}: {error}; check the address, or download it and pass the path") from error
    if name.startswith("data:"):
        header, _, payload = name.partition(",")
        if not header.endswith(";base64"):
            raise ValueError(f"the URL {header!r} is not base64: expected data:image/png;base64,...")
        try:
            return _decode(base64.b64decode(payload, validate=True), "the data URL")
        except binascii.Error as error:
            raise ValueError(f"the data URL is not valid base64: {error}") from error
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"image={name!r} is neither a file nor a URL that starts with http://, https:// or data:")
    return _decode(path.read_bytes(), str(path))


def _decode(data: bytes, origin: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{origin} cannot be read as a picture: {error}") from error
    return picture


def array_to_pil(array: np.ndarray) -> Image.Image:
    """Turns ``(H, W)``, ``(H, W, C)`` or ``(1, H, W, C)``, of ``uint8`` or floats in 0..1, into a picture.

    Raises:
        ValueError: Another shape or range, or NaN.
        TypeError: Another type of number.
    """
    shape = array.shape
    array = array[0] if array.ndim == 4 and shape[0] == 1 else array
    array = array[..., 0] if array.ndim == 3 and shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[-1] not in (3, 4)):
        raise ValueError(f"an array of shape {shape} is not one picture: expected height, width and 1, 3 or 4 channels")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"an array of floats holds {array.min():.4g}..{array.max():.4g}: expected 0..1, without NaN")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"an array of {array.dtype}: expected uint8 in 0..255 or floats in 0..1")
    return Image.fromarray(array)


def plain(picture: Image.Image) -> Image.Image:
    """Brings a picture to one of the modes L, RGB and RGBA without loss of meaning: palettes are looked up, 16 bits scaled."""
    if picture.mode in ("L", "RGB", "RGBA"):
        return picture
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(f"a picture of mode {picture.mode} holds {values.min()}..{values.max()}: expected 16 bits, 0..65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode in ("1", "F"):
        return picture.convert("L")
    return picture.convert("RGBA" if picture.mode in ("LA", "La", "PA", "RGBa") or "transparency" in picture.info else "RGB")


def opaque(picture: Image.Image) -> Image.Image:
    """Returns the picture in RGB, its transparent parts laid over white."""
    if "transparency" in picture.info and picture.mode in ("L", "RGB"):
        picture = picture.convert("RGBA")
    picture = plain(picture)
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Lays pictures out in rows.

    Args:
        images: ``rows * cols`` pictures, row by row. Each has a cell of the first one's size.
        rows, cols: Of the grid.
        resize: Edge of a square that every picture is resized to first.

    Raises:
        ValueError: The number of pictures is not ``rows * cols``.
    """
    if len(images) != rows * cols or not images:
        raise ValueError(f"{len(images)} pictures do not fill rows={rows} by cols={cols}: pass exactly {rows * cols}, at least one")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % cols * width, index // cols * height))
    return grid


def outpaint(
    image: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, overlap: int = 16
) -> tuple[Image.Image, Image.Image]:
    """Prepares a picture to be continued beyond its edges by any inpainting pipeline.

    Args:
        image: The picture.
        left, top, right, bottom: Pixels to add at each edge.
        overlap: How far the painting reaches into the picture at the edges that are continued, so that no seam shows.

    Returns:
        The larger picture, its edges drawn out, and the mask, white where to paint: ``image`` and ``mask_image`` of the call.

    Raises:
        ValueError: Nothing is added, or something is negative.
    """
    added = (left, top, right, bottom)
    if not all(isinstance(n, Integral) and n >= 0 for n in (*added, overlap)) or not any(added):
        raise ValueError(
            f"left, top, right, bottom={added}, overlap={overlap}: add pixels at one edge or more, whole and none negative"
        )
    pixels = np.asarray(opaque(image))
    height, width = pixels.shape[:2]
    canvas = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.full(canvas.shape[:2], 255, np.uint8)
    inner = [edge + overlap * (edge > 0) for edge in added]  # a continued edge gives way
    mask[inner[1] : top + height - overlap * (bottom > 0), inner[0] : left + width - overlap * (right > 0)] = 0
    return Image.fromarray(canvas), Image.fromarray(mask)


def save_image(image: Image.Image, path: str | Path, recipe: dict[str, Any] | None = None) -> None:
    """Writes a picture so that an interruption leaves the old file whole.

    Args:
        image: The picture.
        path: File; its suffix is the format.
        recipe: What the picture was made with, kept as JSON inside the file; PNG only. See :func:`read_recipe`.

    Raises:
        ValueError: The suffix is unknown, or a recipe meets a format other than PNG or holds NaN.
        TypeError: ``image`` is not a PIL picture, or the recipe is not JSON.
        OSError: The file cannot be written.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image is a {type(image).__name__}: expected a PIL picture, as load_image returns")
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise ValueError(f"path={str(path)!r} has no suffix of a picture format: use .png, .jpg or .webp")
    options: dict[str, Any] = {}
    if recipe is not None:
        if image_format != "PNG":
            raise ValueError(f"a recipe can be kept in PNG files alone, not in {path.name!r}: use the suffix .png")
        text = PngImagePlugin.PngInfo()
        text.add_text(RECIPE_KEY, json.dumps(recipe, allow_nan=False))
        options["pnginfo"] = text
    write_atomically(path, lambda temporary: image.save(temporary, format=image_format, **options))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads the recipe of a PNG file that :func:`save_image` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a picture, or holds no recipe.
    """
    try:
        recipe = json.loads(_decode(Path(path).read_bytes(), str(path)).info.get(RECIPE_KEY, ""))
    except json.JSONDecodeError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no recipe: only PNG files saved with one, and not edited since, do")
    return recipe
