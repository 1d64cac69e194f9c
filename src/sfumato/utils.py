"""Helpers under the module name where users of diffusers look for them."""

from .media.image import load_image, make_image_grid

__all__ = ["load_image", "make_image_grid"]
