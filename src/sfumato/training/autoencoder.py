"""Autoencoders: pixels, edges and a weak prior (arXiv:2112.10752, section 3.1, without the adversary): enough for flat art."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..errors import ConfigError
from .components import Pictures, held_out_batches, network, to_input
from .data import Example, read_examples
from .loop import Inputs
from .sampling import Sampler
from .settings import AutoencoderSettings


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels of ``(B, C, H, W)``, downwards and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


class AutoencoderLoss(nn.Module):
    """L1 of pixels, L1 of their differences, and the divergence of the latents to the normal distribution."""

    def __init__(self, vae: Any, gradient_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.gradient_weight, self.kl_weight = vae, gradient_weight, kl_weight

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """``pixels`` (B, 3, H, W) in -1..1, ``noise`` (B, L, h, w) for the latents -> scalar."""
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = (decoded - pixels).abs().mean()
        for made, wanted in zip(edges(decoded), edges(pixels), strict=True):
            loss = loss + self.gradient_weight * (made - wanted).abs().mean()
        return loss + self.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()


class Autoencoder:
    """Trains an ``AutoencoderKL``; see :class:`sfumato.training.loop.Task`."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        if settings.vae is None:
            raise ConfigError("vae is not given: name a folder to start from, or add a table [vae] for a new one")
        self.settings, self.is_new = settings, isinstance(settings.vae, dict)
        self.vae = network("AutoencoderKL", settings.vae, settings.seed, "vae")
        if settings.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.module = AutoencoderLoss(self.vae, settings.gradient_weight, settings.kl_weight)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        examples = read_examples(settings.data, captions=False)
        self.train, self.test = self._pictures(examples), None
        self.sampler = Sampler(self.train.buckets, [e.weight for e in examples], settings.batch_size, settings.seed)
        self.held_out: list[list[int]] = []
        if settings.validation_data:
            self.test = self._pictures(read_examples(settings.validation_data, captions=False))
            self.held_out = held_out_batches(self.test.buckets, settings.batch_size)

    def _pictures(self, examples: list[Example]) -> Pictures:
        s = self.settings
        cache = Path(s.out) / "cache" / "pixels"
        return Pictures(examples, cache, s.resolution, self.factor, s.aspect_buckets, lambda x: x, "bytes")

    def inputs(self, examples: list[int], draw: torch.Generator, held_out: bool = False) -> Inputs:
        pixels = to_input((self.test if held_out else self.train)[examples])  # type: ignore[index]
        height, width = (edge // self.factor for edge in pixels.shape[-2:])
        return {"pixels": pixels, "noise": torch.randn(len(pixels), self.vae.config.latent_channels, height, width, generator=draw)}

    def pictures(self) -> list[Image.Image]:
        """Held-out pictures, each above what the autoencoder makes of it."""
        if not self.held_out:
            return []
        pixels = self.inputs(self.held_out[0][:8], torch.Generator(), held_out=True)["pixels"].to(self.vae.device)
        made = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample
        both = ((torch.cat([pixels, made], dim=2).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in both]

    def save(self, folder: Path) -> None:
        """Writes the autoencoder; a new one with the scaling factor that gives its latents a deviation of one."""
        if self.is_new and "scaling_factor" not in self.settings.vae:  # type: ignore[operator]
            latents = [self.latents(k).flatten() for k in range(16)]
            self.vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())
        self.vae.save_pretrained(folder)

    def latents(self, batch: int) -> torch.Tensor:
        """Latents of a training batch."""
        pixels = to_input(self.train[self.sampler.batch(batch)]).to(self.vae.device)
        return self.vae.encode(pixels).latent_dist.mean
