"""Pictures in and out: the processor against the reference's, loading, grids, and PNG files with recipes."""

from __future__ import annotations

import base64
import http.server
import inspect
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as Reference
from diffusers.utils import load_image as reference_load_image
from diffusers.utils import make_image_grid as reference_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.media.image import load_image, make_image_grid, read_recipe, save_image
from sfumato.media.processor import VaeImageProcessor

RANDOM = np.random.default_rng(0)
FLOATS = RANDOM.random((37, 50, 3)).astype(np.float32)
PIXELS = RANDOM.integers(0, 256, (37, 50, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
SMOOTH = Image.linear_gradient("L").resize((50, 37)).convert("RGB")
TENSOR = torch.from_numpy(FLOATS).permute(2, 0, 1)
MASK = Image.fromarray(RANDOM.integers(0, 256, (37, 50), dtype=np.uint8))

INPUTS: dict[str, Any] = {
    "rgb": RGB,
    "list": [RGB, SMOOTH],
    "grey": RGB.convert("L"),
    "rgba": RGB.convert("RGBA"),
    "array": FLOATS,
    "array list": [FLOATS, FLOATS[::-1].copy()],
    "array batch": FLOATS[None].repeat(2, 0),
    "array batches": [FLOATS[None], FLOATS[None]],
    "array 2d": FLOATS[..., 0],
    "array one channel": FLOATS[..., :1],
    "array -1..1": FLOATS * 2 - 1,
    "tensor": TENSOR,
    "tensor list": [TENSOR, TENSOR.flip(1)],
    "tensor batch": TENSOR[None].repeat(2, 1, 1, 1),
    "tensor one channel": TENSOR[:1],
    "tensor -1..1": TENSOR * 2 - 1,
    "tensor half": TENSOR.half(),
    "latents": torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)),
}
MASKS: dict[str, Any] = {
    "rgb": RGB,
    "grey": MASK,
    "array 2d": FLOATS[..., 0],
    "array batch": FLOATS.transpose(2, 0, 1).copy(),
    "array one channel": FLOATS[..., :1],
    "tensor 2d": TENSOR[0],
    "tensor batch": TENSOR,
    "tensor one channel": TENSOR[:1],
}


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def same(actual: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            same(mine, theirs)
    elif isinstance(expected, Image.Image):
        assert (actual.mode, actual.size) == (expected.mode, expected.size)
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    else:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


def both(config: dict[str, Any]) -> tuple[VaeImageProcessor, Reference]:
    return VaeImageProcessor(**config), Reference(**config)


def test_signatures_are_the_references() -> None:
    for name, method in inspect.getmembers(Reference, callable):
        if name in Reference.__dict__ and (not name.startswith("_") or name == "__init__"):
            mine, theirs = (
                [(p.name, p.default) for p in inspect.signature(m).parameters.values() if p.name != "self"]
                for m in (getattr(VaeImageProcessor, name), method)
            )
            assert mine == theirs, name
    public = {key: value for key, value in Reference().config.items() if not key.startswith("_")}
    assert {key: value for key, value in VaeImageProcessor().config.items() if not key.startswith("_")} == public


@pytest.mark.parametrize("size", [(None, None), (40, 64), (41, None)])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    "config", [{}, {"do_normalize": False, "vae_scale_factor": 16, "resample": "bicubic"}], ids=["plain", "16"]
)
def test_preprocess(kind: str, size: tuple[int | None, int | None], config: dict[str, Any]) -> None:
    ours, reference = both(config)
    same(ours.preprocess(INPUTS[kind], *size), reference.preprocess(INPUTS[kind], *size))


@pytest.mark.parametrize("kind", MASKS)
def test_preprocess_masks(kind: str) -> None:
    ours, reference = both({"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True})
    same(ours.preprocess(MASKS[kind], 40, 64), reference.preprocess(MASKS[kind], 40, 64))


@pytest.mark.parametrize(
    "config",
    [
        {"do_convert_rgb": True},
        {"do_resize": False},
        {"reducing_gap": 2, "resample": "bilinear"},
        {"resample": "nearest"},
        {"vae_latent_channels": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["rgb", "grey", "rgba", "array", "tensor"])
def test_preprocess_configurations(kind: str, config: dict[str, Any]) -> None:
    ours, reference = both(config)
    same(ours.preprocess(INPUTS[kind], 16, 24), reference.preprocess(INPUTS[kind], 16, 24))


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 64), (37, 50), (8, 200), (80, 8), (18, 24)])
@pytest.mark.parametrize("kind", ["rgb", "grey", "rgba"])
def test_resize_modes(kind: str, size: tuple[int, int], mode: str) -> None:
    ours, reference = both({})
    same(ours.resize(INPUTS[kind], *size, mode), reference.resize(INPUTS[kind], *size, mode))
    same(ours.preprocess(RGB, 40, 64, mode, (3, 4, 30, 31)), reference.preprocess(RGB, 40, 64, mode, (3, 4, 30, 31)))


def test_resize_of_arrays_and_tensors() -> None:
    ours, reference = both({})
    same(ours.resize(FLOATS[None], 24, 31), reference.resize(FLOATS[None], 24, 31))
    same(ours.resize(TENSOR[None], 24, 31), reference.resize(TENSOR[None], 24, 31))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_crop_region(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = Image.new("L", (width, height))
    mask.paste(255, (left, top, right, bottom))
    arguments = (mask, data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64)), data.draw(st.integers(0, 20)))
    box = VaeImageProcessor.get_crop_region(*arguments)
    assert box == Reference.get_crop_region(*arguments)
    assert box[0] <= left < right <= box[2] and box[1] <= top < bottom <= box[3]


def test_small_operations() -> None:
    ours, reference = both({})
    same(ours.blur(MASK, 3), reference.blur(MASK, 3))
    same(ours.convert_to_rgb(MASK), reference.convert_to_rgb(MASK))
    same(ours.convert_to_grayscale(RGB), reference.convert_to_grayscale(RGB))
    for pictures in (RGB, MASK, [RGB, SMOOTH], [MASK, MASK]):
        same(ours.pil_to_numpy(pictures), reference.pil_to_numpy(pictures))
    for array in (FLOATS, FLOATS[None], FLOATS[None, ..., :1]):
        same(ours.numpy_to_pil(array), reference.numpy_to_pil(array))
        same(ours.numpy_to_pt(array), reference.numpy_to_pt(array))
    same(ours.pt_to_numpy(TENSOR[None].bfloat16()), reference.pt_to_numpy(TENSOR[None].bfloat16()))
    same(ours.normalize(FLOATS), reference.normalize(FLOATS))
    same(ours.normalize(TENSOR), reference.normalize(TENSOR))
    same(ours.denormalize(TENSOR * 3 - 1), reference.denormalize(TENSOR * 3 - 1))
    same(ours.binarize(TENSOR), reference.binarize(TENSOR.clone()))
    for size in ((None, None), (41, None), (None, 33), (64, 64)):
        assert ours.get_default_height_width(RGB, *size) == reference.get_default_height_width(RGB, *size)
        assert ours.get_default_height_width(TENSOR[None], *size) == reference.get_default_height_width(TENSOR[None], *size)
        assert ours.get_default_height_width(FLOATS[None], *size) == reference.get_default_height_width(FLOATS[None], *size)


@pytest.mark.parametrize("box", [None, (5, 6, 30, 31), (0, 0, 50, 20)])
def test_overlay(box: tuple[int, int, int, int] | None) -> None:
    ours, reference = both({})
    image = SMOOTH if box is None else SMOOTH.resize((32, 40))
    for mask in (MASK, MASK.point(lambda value: 255 * (value > 127))):
        same(ours.apply_overlay(mask, RGB, image, box), reference.apply_overlay(mask, RGB, image, box))


@pytest.mark.parametrize("output", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("flags", [None, [True, False], [False, False]])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_postprocess(output: str, flags: list[bool] | None, channels: int, dtype: torch.dtype) -> None:
    decoded = torch.randn(2, channels, 8, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoded = decoded if flags is None else decoded.sigmoid()
    for config in ({}, {"do_normalize": False}):
        ours, reference = both(config)
        decoded = decoded.sigmoid() if config else decoded
        same(ours.postprocess(decoded, output, flags), reference.postprocess(decoded, output, flags))


def test_nan_in_the_decoded_picture_names_the_vae() -> None:
    decoded = torch.zeros(1, 3, 8, 8, dtype=torch.float16)
    decoded[0, 1, 2, 3] = torch.nan
    for output in ("pil", "np", "pt"):
        with pytest.raises(
            FloatingPointError, match=r"the VAE produced NaN or infinity in torch\.float16: load it in float32 or bfloat16"
        ):
            VaeImageProcessor().postprocess(decoded, output)
    with pytest.raises(TypeError, match="image is a ndarray"):
        VaeImageProcessor().postprocess(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match="output_type='jpg': expected 'pil'"):
        VaeImageProcessor().postprocess(decoded, "jpg")
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\): expected \(B, C, H, W\)"):
        VaeImageProcessor().postprocess(decoded[0])
    with pytest.raises(ValueError, match="do_denormalize has 2 entries for 1"):
        VaeImageProcessor().postprocess(torch.zeros(1, 3, 8, 8), "pt", [True, False])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "image holds NoneType: expected PIL pictures"),
        ("a.png", TypeError, "image holds str.*see load_image"),
        ([RGB, FLOATS], TypeError, "image holds Image, ndarray"),
        ([], ValueError, "image is an empty list"),
        ([RGB, RGB.resize((40, 40))], ValueError, "several sizes.*pass height and width"),
        ([RGB, MASK], ValueError, "several modes, L, RGB"),
        ([TENSOR, TENSOR[:, :20]], ValueError, "several shapes"),
        (RGB.resize((5, 50)), ValueError, "height 50 and width 5 is too small: each must be at least 8"),
        (FLOATS * np.nan, ValueError, r"nan\.\.nan: expected floats in 0..1"),
        (TENSOR * 255, ValueError, "divide by 255"),
        (TENSOR - 5, ValueError, "divide by 255"),
        (FLOATS[..., :2], ValueError, "a picture of 2 channels"),
        (FLOATS.repeat(2, -1), ValueError, "a picture of 6 channels"),
        (FLOATS[0, 0], ValueError, r"images has shape \(3,\): expected \(H, W\) or"),
        ((TENSOR * 255).long(), TypeError, "a picture of torch.int64: expected uint8"),
    ],
)
def test_bad_pictures(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VaeImageProcessor().preprocess(image)


def test_bad_arguments() -> None:
    processor = VaeImageProcessor()
    with pytest.raises(ValueError, match="resize_mode='stretch': expected 'default', 'fill' or 'crop'"):
        processor.preprocess(RGB, 32, 32, "stretch")
    with pytest.raises(ValueError, match="resize_mode='fill' takes PIL pictures, not a Tensor"):
        processor.preprocess(TENSOR, 32, 32, "fill")
    with pytest.raises(ValueError, match=r"crops_coords=.* takes PIL pictures, not ndarray"):
        processor.preprocess(FLOATS, 32, 32, crops_coords=(0, 0, 8, 8))
    with pytest.raises(ValueError, match="contradict"):
        VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True)
    with pytest.raises(ValueError, match="resample='box': expected one of nearest"):
        VaeImageProcessor(resample="box")
    with pytest.raises(ValueError, match="mask_image is all black"):
        processor.get_crop_region(Image.new("L", (8, 8)), 8, 8)
    with pytest.raises(ValueError, match="sizes do not fit"):
        processor.apply_overlay(MASK, RGB, RGB.resize((8, 8)))
    with pytest.raises(ValueError, match="a picture of 3 channels"):
        VaeImageProcessor(do_convert_grayscale=True).preprocess(TENSOR[None])


def test_bytes_palettes_and_16_bits_mean_the_same_as_rgb() -> None:
    """Where the reference takes bytes for floats, palette indices for grey, and 16 bits for 8."""
    processor = VaeImageProcessor(do_resize=False)
    expected = Reference(do_resize=False).preprocess(RGB)
    same(processor.preprocess(PIXELS), expected)
    same(processor.preprocess(torch.from_numpy(PIXELS).permute(2, 0, 1)), expected)
    few = RGB.quantize(16)
    same(processor.preprocess(few), Reference(do_resize=False).preprocess(few.convert("RGB")))
    deep = Image.fromarray(np.asarray(MASK).astype(np.uint16) * 257)
    same(processor.preprocess(deep), Reference(do_resize=False).preprocess(MASK))
    same(processor.preprocess(MASK.convert("1")), Reference(do_resize=False).preprocess(MASK.convert("1").convert("L")))


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/a.png"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(png(RGB) if known else b"")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()


def test_load_image_from_anywhere(tmp_path: Path, server: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(RGB))
    url = "data:image/png;base64," + base64.b64encode(png(RGB)).decode()
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    sources = [file, str(file), png(RGB), url, RGB, PIXELS, PIXELS[None], PIXELS / 255, tensor, tensor[None], tensor / 255]
    for source in [*sources, f"{server}/a.png", (tensor / 255).double()]:
        same(load_image(source), RGB)
    same(load_image(str(file)), reference_load_image(str(file)))
    same(load_image(MASK, lambda image: image), MASK)
    same(load_image(np.asarray(MASK), lambda image: image), MASK)
    same(load_image(torch.from_numpy(np.array(MASK)), lambda image: image), MASK)
    same(load_image(np.asarray(MASK)), reference_load_image(MASK))


def test_load_image_turns_upright() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.open(io.BytesIO(png(RGB, exif=exif)))
        same(load_image(png(RGB, exif=exif)), reference_load_image(turned))


def test_load_image_modes() -> None:
    clear = RGB.copy()
    clear.putalpha(MASK)
    alpha = np.asarray(MASK)[..., None] / 255
    laid_over_white = PIXELS * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(load_image(clear)) - laid_over_white).max() <= 1
    same(load_image(png(clear), lambda image: image), clear)
    same(load_image(png(clear), lambda image: image.getchannel("A")), MASK)
    palette = RGB.quantize(16)
    same(load_image(png(palette)), palette.convert("RGB"))
    hole = np.asarray(load_image(png(palette, transparency=3)))
    assert (hole[np.asarray(palette) == 3] == 255).all()
    deep = Image.fromarray(np.asarray(MASK).astype(np.uint16) * 257)
    same(load_image(png(deep)), MASK.convert("RGB"))
    same(load_image(RGB.convert("CMYK")), RGB.convert("CMYK").convert("RGB"))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such.png", FileNotFoundError, "neither a file nor a URL"),
        (b"not a picture", ValueError, "the bytes given cannot be read as a picture"),
        (png(RGB)[:200], ValueError, "cannot be read as a picture"),
        ("data:text/plain,hello", ValueError, "not base64"),
        ("data:image/png;base64,***", ValueError, "not valid base64"),
        (3, TypeError, "image is a int"),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, "not one picture"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, "not one picture"),
        (FLOATS * 255, ValueError, "expected 0..1"),
        (FLOATS * np.nan, ValueError, "expected 0..1"),
        (np.zeros((8, 8), np.int32), TypeError, "an array of int32"),
        ("http://127.0.0.1:9/a.png", OSError, "could not fetch http://127.0.0.1:9/a.png"),
    ],
)
def test_load_image_errors(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_image(source)


def test_load_image_names_the_servers_answer(server: str) -> None:
    with pytest.raises(OSError, match=r"could not fetch .*/b\.png: HTTP Error 404"):
        load_image(f"{server}/b.png")


def test_grid() -> None:
    pictures = [RGB, MASK, SMOOTH, RGB.resize((20, 20))]
    same(make_image_grid(pictures, 2, 2), reference_grid(pictures, 2, 2))
    same(make_image_grid(pictures, 1, 4, resize=16), reference_grid(pictures, 1, 4, resize=16))
    with pytest.raises(ValueError, match="4 pictures do not fill rows=3 by cols=2: pass exactly 6"):
        make_image_grid(pictures, 3, 2)


def test_recipe_travels_in_the_file(tmp_path: Path) -> None:
    recipe = {"prompt": "a café – 東京 " + "x" * 3000, "seed": 3, "sizes": [512, 512], "guidance": 7.5, "model": None}
    path = tmp_path / "a.png"
    save_image(RGB, path, recipe)
    same(load_image(path), RGB)
    assert read_recipe(path) == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    save_image(RGB, str(tmp_path / "b.jpg"))
    assert Image.open(tmp_path / "b.jpg").format == "JPEG"


def test_recipe_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_image(RGB, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds no recipe"):
        read_recipe(path)
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "b.png")
    with pytest.raises(ValueError, match="PNG files alone"):
        save_image(RGB, tmp_path / "a.jpg", {})
    with pytest.raises(ValueError, match="no suffix of a picture format"):
        save_image(RGB, tmp_path / "a")
    with pytest.raises(TypeError, match="image is a Tensor"):
        save_image(TENSOR, path)
    with pytest.raises(TypeError, match="JSON"):
        save_image(RGB, path, {"generator": object()})
    with pytest.raises(ValueError, match="JSON"):
        save_image(RGB, path, {"scale": float("nan")})
    assert path.read_bytes() == before
    with pytest.raises(OSError):
        save_image(RGB, tmp_path / "none" / "a.png", {})


def test_loading_pictures_does_not_need_torch() -> None:
    code = "import sys; from sfumato.utils import load_image, make_image_grid; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
