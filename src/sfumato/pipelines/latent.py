"""Latent formats: between pictures and the tensors that a denoiser works on."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..random import Generators

_RGB_FACTORS: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
_RGB_LOCK = threading.Lock()


@dataclass(frozen=True)
class LatentFormat:
    """The latents of an autoencoder: how large, how scaled."""

    vae: Any  # the autoencoder
    channels: int  # of a latent
    factor: int  # pixels per latent, in height and width
    scale: float  # latents are the autoencoder's values, less the shift, times this
    shift: float = 0.0

    @classmethod
    def of(cls, vae: Any) -> LatentFormat:
        """Reads the format from the autoencoder's configuration."""
        config = vae.config
        names = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")
        blocks = next(config[name] for name in names if config.get(name))
        shift = config.get("shift_factor") or 0.0
        return cls(vae, config.latent_channels, 2 ** (len(blocks) - 1), config.scaling_factor, shift)

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of ``batch`` pictures of ``height`` x ``width`` pixels."""
        return batch, self.channels, height // self.factor, width // self.factor

    def encode(self, image: torch.Tensor, generator: Generators = None, mode: bool = False) -> torch.Tensor:
        """Encodes pictures ``(B, 3, H, W)`` in -1..1.

        ``generator`` draws the posterior's sample, a list each picture's with its own. ``mode`` takes the posterior's mode instead,
        unscaled, as conditions by channels want it.
        """
        if isinstance(generator, list) and not mode:
            return torch.cat([self.encode(image[i : i + 1], generator[i]) for i in range(len(image))])
        encoded = self.vae.encode(image.to(self.vae.dtype))
        if not hasattr(encoded, "latent_dist"):
            return encoded.latents if mode else self.scaled(encoded.latents)
        if mode:
            return encoded.latent_dist.mode()
        return self.scaled(encoded.latent_dist.sample(generator))

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """The autoencoder's values as latents."""
        return (values - self.shift) * self.scale if self.shift else values * self.scale

    def decode(self, latents: torch.Tensor, generator: Generators = None, **extras: torch.Tensor) -> torch.Tensor:
        """Decodes latents to pictures ``(B, 3, H, W)``, about -1..1."""
        drawing = {"generator": generator} if type(self.vae).__name__ in ("AutoencoderKL", "AsymmetricAutoencoderKL") else {}
        values = latents / self.scale + self.shift if self.shift else latents / self.scale
        return self.vae.decode(values, return_dict=False, **drawing, **extras)[0]

    @torch.no_grad()
    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Approximates the pictures of latents linearly, at one pixel per latent: ``(B, C, h, w)`` -> ``(B, 3, h, w)`` in 0..1."""
        factors = self._rgb_factors().to(latents)
        rgb = torch.einsum("bchw,cr->brhw", latents, factors[:-1]) + factors[-1][None, :, None, None]
        return (rgb / 2 + 0.5).clamp(0, 1)

    def _rgb_factors(self) -> torch.Tensor:
        """Least-squares map ``(C + 1, 3)`` from a latent and 1 to the mean colour of its pixels, fitted once per autoencoder."""
        with _RGB_LOCK:
            if self.vae not in _RGB_FACTORS:
                generator = torch.Generator().manual_seed(0)
                flat = torch.randn(16, self.channels, 1, 1, generator=generator)
                latents = flat.expand(-1, -1, 8, 8).to(self.vae.device, self.vae.dtype)
                colours = self.decode(latents).float().mean(dim=(2, 3)).cpu()  # (16, 3)
                ones = torch.ones(len(colours), 1)
                _RGB_FACTORS[self.vae] = torch.linalg.lstsq(torch.cat([flat[:, :, 0, 0], ones], 1), colours).solution
            return _RGB_FACTORS[self.vae]
