"""Between pictures as users hold them and the tensors that autoencoders take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

from ..config import ConfigMixin
from .image import plain

Box = tuple[int, int, int, int]
Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]

RESAMPLE = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
RESAMPLE["linear"] = RESAMPLE["bilinear"]
OVERSHOOT = 0.1
"""How far values may leave their range: interpolation overshoots a little."""


class VaeImageProcessor(ConfigMixin):
    """Prepares pictures for an autoencoder and turns its output into pictures.

    Args:
        do_resize: Resize to the wanted size, or down to multiples of ``vae_scale_factor``.
        vae_scale_factor: Sizes are multiples of this.
        vae_latent_channels: Tensors with this many channels are latents and pass unchanged.
        resample: Filter for PIL pictures, a key of ``RESAMPLE``; arrays and tensors are resized by nearest neighbour.
        reducing_gap: Reduce PIL pictures in two steps, faster; ``None`` for one exact step.
        do_normalize: Map 0..1 to -1..1.
        do_binarize: Map values below 0.5 to 0 and the others to 1, for masks.
        do_convert_rgb, do_convert_grayscale: Convert to three channels, or PIL pictures to one.

    Raises:
        ValueError: Both conversions are asked for, or ``resample`` is unknown.
    """

    def __init__(
        self, do_resize: bool = True, vae_scale_factor: int = 8, vae_latent_channels: int = 4, resample: str = "lanczos",
        reducing_gap: int | None = None, do_normalize: bool = True, do_binarize: bool = False, do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:  # fmt: skip
        if do_convert_rgb and do_convert_grayscale:
            raise ValueError("do_convert_rgb=True and do_convert_grayscale=True contradict each other: set one of them")
        if resample not in RESAMPLE:
            raise ValueError(f"resample={resample!r}: expected one of {', '.join(RESAMPLE)}")

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """``(B, H, W, C)`` or ``(H, W, C)`` in 0..1 -> pictures."""
        scaled = _shaped(images, "(B, H, W, C)", "(H, W, C)") * 255
        pixels = np.round(scaled, out=scaled).astype(np.uint8)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pixels]

    @staticmethod
    def pil_to_numpy(images: list[Image.Image] | Image.Image) -> np.ndarray:
        """Pictures of one size and mode -> ``(B, H, W, C)``, or ``(B, H, W)`` of one channel, in 0..1."""
        images = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> torch.Tensor:
        """``(B, H, W, C)`` or ``(B, H, W)`` -> ``(B, C, H, W)``."""
        images = images[..., None] if _shaped(images, "(B, H, W, C)", "(B, H, W)").ndim == 3 else images
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    @staticmethod
    def pt_to_numpy(images: torch.Tensor) -> np.ndarray:
        """``(B, C, H, W)`` -> ``(B, H, W, C)``, float32."""
        return _shaped(images, "(B, C, H, W)").detach().cpu().permute(0, 2, 3, 1).float().numpy()

    @staticmethod
    def normalize(images: Any) -> Any:
        """0..1 -> -1..1, array or tensor."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Any) -> Any:
        """-1..1 -> 0..1, array or tensor; values outside are clipped."""
        return images.mul(0.5).add_(0.5).clamp_(0, 1) if isinstance(images, torch.Tensor) else (images * 0.5 + 0.5).clip(0, 1)

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """Picture -> RGB; transparency is dropped."""
        return plain(image).convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Picture -> one channel."""
        return plain(image).convert("L")

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """Blurs by a Gaussian of this radius, to soften a mask's edge."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def binarize(image: Any) -> Any:
        """Array or tensor: below 0.5 -> 0, else 1."""
        mask = image >= 0.5
        return mask.to(image.dtype) if isinstance(image, torch.Tensor) else mask.astype(image.dtype)

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> Box:
        """Finds the box (left, top, right, bottom) around the part of a mask that is not black, with a margin of ``pad``.

        It has the shape of ``width`` x ``height``, to which it will be resized, as far as the picture allows.

        Raises:
            ValueError: The mask is all black.
        """
        box = plain(mask_image).convert("L").getbbox()
        if box is None:
            raise ValueError("mask_image is all black: there is nothing to crop to; paint the part to change white")
        left, right = max(box[0] - pad, 0), min(box[2] + pad, mask_image.width)
        top, bottom = max(box[1] - pad, 0), min(box[3] + pad, mask_image.height)
        across, down = right - left, bottom - top
        if across / down > width / height:
            top, bottom = _grow(top, bottom, int(across / (width / height) - down), mask_image.height)
        else:
            left, right = _grow(left, right, int(down * (width / height) - across), mask_image.width)
        return left, top, right, bottom

    def resize(self, image: Picture, height: int, width: int, resize_mode: str = "default") -> Any:
        """Resizes.

        Args:
            image: A PIL picture, an array ``(B, H, W, C)`` or a tensor ``(B, C, H, W)``.
            height, width: Of the result.
            resize_mode: ``"default"`` stretches; for PIL pictures also ``"fill"`` (fit inside, the borders continue the edge) and
                ``"crop"`` (cover, cut what exceeds).

        Raises:
            ValueError: The mode is unknown or does not fit the kind of picture.
        """
        if resize_mode not in ("default", "fill", "crop"):
            raise ValueError(f"resize_mode={resize_mode!r}: expected 'default', 'fill' or 'crop'")
        if isinstance(image, Image.Image):
            if resize_mode != "default":
                return self._fit(image, width, height, cover=resize_mode == "crop")
            return image.resize((width, height), RESAMPLE[self.config.resample], reducing_gap=self.config.reducing_gap)
        if resize_mode != "default":
            raise ValueError(f"resize_mode={resize_mode!r} takes PIL pictures, not a {type(image).__name__}: use load_image first")
        if isinstance(image, np.ndarray):
            return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))
        return F.interpolate(image, size=(height, width))

    def _fit(self, image: Image.Image, width: int, height: int, cover: bool) -> Image.Image:
        """Resizes with the proportions kept and centres on ``width`` x ``height``; borders continue the picture's edge."""
        wider = width / height > image.width / image.height
        across, down = image.height * width // image.width, image.width * height // image.height
        size = (width, across) if wider == cover else (down, height)
        fitted = plain(image).resize(size, RESAMPLE["lanczos"])
        left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
        result = Image.new("RGB", (width, height))
        # the borders: boxes without area at an edge, which resampling reads as the colours at that edge
        if top > 0:
            for edge, start in ((0, 0), (size[1], top + size[1])):
                result.paste(fitted.resize((width, top), box=(0, edge, size[0], edge)), (0, start))
        elif left > 0:
            for edge, start in ((0, 0), (size[0], left + size[0])):
                result.paste(fitted.resize((left, height), box=(edge, 0, edge, size[1])), (start, 0))
        result.paste(fitted, (left, top))
        return result

    def get_default_height_width(self, image: Picture, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Returns the wanted or else the picture's height and width, rounded down to multiples of ``vae_scale_factor``.

        The picture is PIL, an array ``(H, W)``, ``(H, W, C)`` or ``(B, H, W, C)``, or a tensor ``(..., H, W)``.

        Raises:
            ValueError: Nothing would be left.
        """
        if isinstance(image, Image.Image):
            own = (image.height, image.width)
        else:
            own = tuple(image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[image.ndim // 4 :][:2])
        factor = self.config.vae_scale_factor
        high, wide = (given if given is not None else size for given, size in zip((height, width), own, strict=True))
        if high < factor or wide < factor:
            raise ValueError(f"a picture of height {high} and width {wide} is too small: each must be at least {factor}")
        return high - high % factor, wide - wide % factor

    def preprocess(
        self, image: Pictures, height: int | None = None, width: int | None = None, resize_mode: str = "default",
        crops_coords: Box | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Makes the autoencoder's input.

        Args:
            image: A picture or a list of pictures of one kind: PIL; arrays ``(H, W)``, ``(H, W, C)`` or ``(B, H, W, C)``; tensors
                ``(H, W)``, ``(C, H, W)`` or ``(B, C, H, W)``. Arrays and tensors hold ``uint8``, or floats in 0..1, or in -1..1,
                which then are not normalised again. With ``do_convert_grayscale`` three dimensions are ``(B, H, W)``.
            height, width: Of the result; by default the first picture's, rounded down to multiples.
            resize_mode: As in :meth:`resize`.
            crops_coords: Box (left, top, right, bottom) cut out of PIL pictures first.

        Returns:
            ``(B, C, H, W)``, in -1..1 or 0..1 as configured. Latents are returned unchanged.

        Raises:
            TypeError: Not pictures, or pictures of several kinds, or of an unfit type of number.
            ValueError: No pictures; several sizes; a wrong number of channels; NaN; values out of range.
        """
        several = isinstance(image, (list, tuple))
        items: list[Any] = list(image) if several else [image]  # type: ignore[arg-type]
        kind = _kind(items)
        if kind is Image.Image:
            x = self._from_pil(items, height, width, resize_mode, crops_coords)
        else:
            if crops_coords is not None:
                raise ValueError(f"crops_coords={crops_coords} takes PIL pictures, not {kind.__name__}: use load_image first")
            tensors = [_as_tensor(item, self.config.do_convert_grayscale and not several) for item in items]
            _one("shapes (channels, height, width)", (tuple(t.shape[1:]) for t in tensors), "resize them to one")
            x = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if kind is torch.Tensor and x.shape[1] == self.config.vae_latent_channels:
                return x
            x = self._checked(x)
            if self.config.do_resize:
                x = self.resize(x, *self.get_default_height_width(x, height, width), resize_mode)
        if self.config.do_normalize and (kind is Image.Image or x.min() >= 0):
            x = self.normalize(x)
        return self.binarize(x) if self.config.do_binarize else x

    def _from_pil(
        self, images: list[Image.Image], height: int | None, width: int | None, resize_mode: str, box: Box | None
    ) -> torch.Tensor:
        images = [plain(image).crop(box) if box is not None else plain(image) for image in images]
        if height is None or width is None or not self.config.do_resize:
            _one("sizes", (image.size for image in images), "resize them to one, or pass height and width")
        if self.config.do_resize:
            height, width = self.get_default_height_width(images[0], height, width)
            images = [self.resize(image, height, width, resize_mode) for image in images]
        if self.config.do_convert_rgb or self.config.do_convert_grayscale:
            images = [image.convert("RGB" if self.config.do_convert_rgb else "L") for image in images]
        _one("modes", (image.mode for image in images), "convert them to one, such as image.convert('RGB')")
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """Refuses ``(B, C, H, W)`` that holds no picture; converts to three channels where configured."""
        known = (1,) if self.config.do_convert_grayscale else (1, 3, 4)
        if x.shape[1] not in known:
            raise ValueError(f"a picture of {x.shape[1]} channels (as (B, C, H, W): {tuple(x.shape)}): expected {known}")
        low, high = (bound.item() for bound in x.aminmax())
        if not (low >= -1 - OVERSHOOT and high <= 1 + OVERSHOOT):
            expected = "floats in 0..1 (or -1..1), without NaN; divide by 255, or pass uint8"
            raise ValueError(f"the picture's values lie in {low:.4g}..{high:.4g}: expected {expected}")
        if self.config.do_convert_rgb:
            return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        return x

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        """Makes pictures of the autoencoder's output.

        Args:
            image: ``(B, C, H, W)``, about -1..1.
            output_type: ``"pil"``, ``"np"`` (``(B, H, W, C)`` in 0..1), ``"pt"`` (``(B, C, H, W)`` in 0..1) or
                ``"latent"`` (as is).
            do_denormalize: For each picture, whether it is in -1..1; by default as ``do_normalize``.

        Raises:
            TypeError: ``image`` is not a tensor.
            ValueError: A wrong shape, an unknown ``output_type``, or as many flags as there are not pictures.
            FloatingPointError: The picture holds NaN or infinity.
        """
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"image is a {type(image).__name__}: expected a tensor (B, C, H, W), as the autoencoder returns")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if output_type == "latent":
            return image
        # one reduction: a sum keeps every NaN and infinity, and in float32 cannot overflow by itself
        if not _shaped(image, "(B, C, H, W)").sum(dtype=torch.float32).isfinite():
            remedy = "load it in float32 or bfloat16, for example vae.to(torch.float32)"
            raise FloatingPointError(f"the VAE produced NaN or infinity in {image.dtype}: {remedy}")
        flags = [self.config.do_normalize] * len(image) if do_denormalize is None else list(do_denormalize)
        if len(flags) != len(image):
            raise ValueError(f"do_denormalize has {len(flags)} entries for {len(image)} pictures")
        if any(flags):
            which = torch.tensor(flags, device=image.device)[:, None, None, None]
            image = self.denormalize(image) if all(flags) else torch.where(which, self.denormalize(image), image)
        if output_type == "pt":
            return image
        array = self.pt_to_numpy(image)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def apply_overlay(
        self, mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: Box | None = None
    ) -> Image.Image:
        """Lays ``init_image`` over the result where the mask is not white.

        Args:
            mask, init_image: Of one size.
            image: The result, of that size too, unless ``crop_coords`` is the box of ``init_image`` that it belongs to.

        Raises:
            ValueError: The sizes do not fit.
        """
        if mask.size != init_image.size or (crop_coords is None and image.size != init_image.size):
            raise ValueError(f"sizes do not fit: mask {mask.size}, init_image {init_image.size}, image {image.size}: resize to one")
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            inside = self.resize(image, bottom - top, right - left, "crop")
            image = Image.new("RGB", init_image.size)
            image.paste(inside, (left, top))
        # premultiplied, so that half-masked pixels carry half their colour
        kept = Image.new("RGBa", init_image.size)
        kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        result = image.convert("RGBA")
        result.alpha_composite(kept.convert("RGBA"))
        return result.convert("RGB")


def _grow(low: int, high: int, extra: int, limit: int) -> tuple[int, int]:
    """Widens an interval by ``extra`` on both sides and shifts it into ``0..limit``."""
    low, high = low - extra // 2, high + extra - extra // 2
    beyond = max(high - limit, 0)
    low, high = low - beyond, high - beyond
    return (0, min(high - low, limit)) if low < 0 else (low, high)


def _shaped(images: Any, *layouts: str) -> Any:
    """Refuses an array or tensor that has not as many dimensions as one of the layouts."""
    if images.ndim not in [layout.count(",") + 1 for layout in layouts]:
        raise ValueError(f"images has shape {tuple(images.shape)}: expected {' or '.join(layouts)}")
    return images


def _one(what: str, found: Iterable[Any], remedy: str) -> None:
    """Refuses pictures that differ."""
    if len(several := sorted(set(found))) > 1:
        raise ValueError(f"the pictures have several {what}, {', '.join(map(str, several))}: {remedy}")


def _kind(items: list[Any]) -> type:
    """Returns the one kind of picture that all items are."""
    if not items:
        raise ValueError("image is an empty list: pass at least one picture")
    known = (Image.Image, np.ndarray, torch.Tensor)
    kinds = {next((k for k in known if isinstance(item, k)), type(item)) for item in items}
    if len(kinds) > 1 or not kinds <= {*known}:
        expected = "PIL pictures, numpy arrays or torch tensors, one kind; see load_image for paths"
        raise TypeError(f"image holds {', '.join(sorted(k.__name__ for k in kinds))}: expected {expected}")
    return kinds.pop()


def _as_tensor(item: np.ndarray | torch.Tensor, by_batch: bool) -> torch.Tensor:
    """Array or tensor -> ``(B, C, H, W)`` of floats; three dimensions are ``(B, H, W)`` when ``by_batch``."""
    array = isinstance(item, np.ndarray)
    layouts = ("(H, W)", "(H, W, C)", "(B, H, W, C)") if array else ("(H, W)", "(C, H, W)", "(B, C, H, W)")
    x = torch.from_numpy(np.ascontiguousarray(_shaped(item, *layouts))) if array else _shaped(item, *layouts)
    if x.dim() == 2:
        x = x[None, None]
    elif x.dim() == 3 and by_batch and not (array and x.shape[-1] == 1):
        x = x[:, None]
    else:
        x = x if x.dim() == 4 else x[None]
        x = x.movedim(-1, 1) if array else x
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not (x.is_floating_point() or x.dtype == torch.bool):
        raise TypeError(f"a picture of {item.dtype}: expected uint8 in 0..255, or floats in 0..1")
    return x.float() if x.dtype == torch.bool or (array and x.dtype == torch.float64) else x


class IPAdapterMaskProcessor(VaeImageProcessor):
    """Prepares masks, white where the picture of an IP-Adapter acts; the arguments are those of :class:`VaeImageProcessor`."""

    def __init__(
        self, do_resize: bool = True, vae_scale_factor: int = 8, resample: str = "lanczos", do_normalize: bool = False,
        do_binarize: bool = True, do_convert_grayscale: bool = True,
    ) -> None:  # fmt: skip
        self.register_to_config(vae_latent_channels=4, reducing_gap=None, do_convert_rgb=False)
