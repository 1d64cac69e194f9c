"""Text-to-image denoisers: Stable Diffusion's U-Net, alone or with its text encoder (arXiv:2112.10752)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..errors import ConfigError
from ..families.stable_diffusion import PARTS
from ..families.stable_diffusion_pipelines import StableDiffusionPipeline
from ..pipelines.latent import LatentFormat
from .cache import Rows, cached, fingerprint
from .components import CACHE_BATCH, Pictures, held_out_batches, network, scheduler, to_input
from .data import Example, read_examples
from .loop import Inputs
from .objectives import Objective, draw_noise, draw_places
from .processes import accelerator
from .sampling import Sampler
from .settings import TextToImageSettings

log = logging.getLogger(__name__)


class DenoiserLoss(nn.Module):
    """Weighted squared error of the denoiser's prediction; trains the text encoder too where it is given."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy: torch.Tensor, time: torch.Tensor, text: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``noisy``, ``target`` (B, C, h, w), ``time``, ``weight`` (B,), ``text``: tokens (B, N) or states (B, N, D) -> scalar."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        error = (self.unet(noisy, time, states).sample.float() - target).square().flatten(1).mean(1)
        return (error if weight is None else error * weight).mean()


class Captions:
    """The captions of a data set, each tokenised (or encoded) once; row 0 is the empty one."""

    def __init__(self, examples: list[Example]) -> None:
        self.texts = list(dict.fromkeys(["", *(t for e in examples for t in e.texts)]))
        rows = {text: row for row, text in enumerate(self.texts)}
        self.of = [torch.tensor([rows[t] for t in e.texts]) for e in examples]

    def draw(self, examples: list[int], dropout: float, draw: torch.Generator) -> list[int]:
        """Draws a caption of each example, or the empty one."""
        chances = torch.rand(len(examples), 2, generator=draw).tolist()
        rows = [self.of[i][int(which * len(self.of[i]))].item() for i, (which, _) in zip(examples, chances, strict=True)]
        return [0 if drop < dropout else int(row) for row, (_, drop) in zip(rows, chances, strict=True)]


class Data:
    """One data set, ready: latents and texts."""

    def __init__(self, task: TextToImage, data: str) -> None:
        s, cache = task.settings, Path(task.settings.out) / "cache"
        examples = read_examples(data)
        self.weights = [e.weight for e in examples]
        self.captions = Captions(examples)
        task.warn_of_cuts(self.captions.texts)
        self.latents = Pictures(
            examples, cache / "latents", s.resolution, task.multiple, s.aspect_buckets, task.encode, fingerprint(task.vae)
        )
        self.texts: Rows | torch.Tensor
        if s.train_text_encoder:
            self.texts = task.tokens(self.captions.texts)
        else:
            texts = self.captions.texts

            def compute(rows: range) -> Any:
                for k in range(0, len(rows), CACHE_BATCH):
                    tokens = task.tokens([texts[r] for r in rows[k : k + CACHE_BATCH]])
                    yield task.text_encoder(tokens.to(task.device))[0]

            place = cache / f"texts-{fingerprint(task.text_encoder, task.tokens(['a']).shape, texts)}"
            with torch.no_grad():
                self.texts = cached(place, len(texts), compute, "texts")


class TextToImage:
    """Trains the denoiser of a Stable Diffusion pipeline; see :class:`sfumato.training.loop.Task`."""

    def __init__(self, settings: TextToImageSettings) -> None:
        self.settings = settings
        self.device = accelerator().device
        self.pipe = assemble(settings).to(self.device)
        self.vae, self.unet, self.tokenizer = self.pipe.vae.eval(), self.pipe.unet, self.pipe.tokenizer
        self.text_encoder = self.pipe.text_encoder
        self.format = LatentFormat.of(self.vae)
        self.multiple = self.format.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.objective = Objective.of(self.pipe.scheduler)
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.data, self.test = Data(self, settings.data), None
        self.held_out: list[list[int]] = []
        if settings.validation_data:
            self.test = Data(self, settings.validation_data)
            self.held_out = held_out_batches(self.test.latents.buckets, settings.batch_size)
        self.sampler = Sampler(self.data.latents.buckets, self.data.weights, settings.batch_size, settings.seed)
        self.module = DenoiserLoss(self.unet, self.text_encoder if settings.train_text_encoder else None)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, 3, H, W) -> mean and deviation of their latents, scaled: (B, 2L, h, w)."""
        posterior = self.vae.encode(to_input(pixels.to(self.device))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1) * self.format.scale

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Tokens of texts, filled up or cut to the tokenizer's length: (B, N)."""
        length = self.tokenizer.model_max_length
        return self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def warn_of_cuts(self, texts: list[str]) -> None:
        """Names captions that are longer than the text encoder reads."""
        length = self.tokenizer.model_max_length
        lengths = map(len, self.tokenizer(texts, verbose=False).input_ids)
        if cut := [text for text, count in zip(texts, lengths, strict=True) if count > length]:
            log.warning("%d of %d captions are cut at %d tokens, the first is %r", len(cut), len(texts), length, cut[0])

    def inputs(self, examples: list[int], draw: torch.Generator, held_out: bool = False) -> Inputs:
        s, data = self.settings, self.test if held_out else self.data
        assert data is not None
        mean, deviation = data.latents[examples].chunk(2, dim=1)
        x0 = mean + deviation * torch.randn(mean.shape, generator=draw)
        noise = draw_noise(x0.shape, s.noise_offset, draw)
        levels = self.objective.levels(draw_places(len(x0), s.timesteps, s.logit_mean, s.logit_std, draw))
        text = data.texts[data.captions.draw(examples, s.caption_dropout, draw)]
        inputs = {"noisy": self.objective.noisy(x0, noise, levels), "time": levels.time, "text": text}
        inputs["target"] = self.objective.target(x0, noise, levels)
        return inputs | ({"weight": self.objective.weight(levels, s.min_snr_gamma)} if s.min_snr_gamma else {})

    def pictures(self) -> list[Image.Image]:
        """A picture of each validation prompt, the first seed."""
        s = self.settings
        if not s.validation_prompts:
            return []
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(0) for _ in s.validation_prompts]
        call = {"num_inference_steps": s.validation_inference_steps, "guidance_scale": s.validation_guidance}
        return self.pipe(list(s.validation_prompts), height=s.resolution, width=s.resolution, generator=generators, **call).images

    def save(self, folder: Path) -> None:
        """Writes the pipeline."""
        self.pipe.save_pretrained(folder)


def assemble(s: TextToImageSettings) -> Any:
    """The pipeline of a run: that of ``model``, with the parts that the settings name in place of its own.

    Raises:
        ConfigError: A part is neither named nor taken from a model, or the parts do not fit.
    """
    parts: dict[str, Any] = {**dict.fromkeys(PARTS), "requires_safety_checker": False}
    if s.model:
        base = StableDiffusionPipeline.from_pretrained(s.model)
        parts |= {**base.components, "requires_safety_checker": base.config["requires_safety_checker"]}
    for name, kind in (("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel"), ("unet", "UNet2DConditionModel")):
        if (value := getattr(s, name)) is not None:
            parts[name] = network(kind, value, s.seed, name)
    if s.tokenizer:
        from transformers import CLIPTokenizer

        parts["tokenizer"] = CLIPTokenizer.from_pretrained(s.tokenizer)
    parts["scheduler"] = scheduler(s.scheduler, parts["scheduler"])
    if missing := [name for name in PARTS if parts[name] is None]:
        raise ConfigError(f"{missing[0]} is not given: name it in the configuration, or a model to take it from")
    unet, text = parts["unet"].config, parts["text_encoder"].config
    for what, got, wanted in (
        ("unet in_channels", unet.in_channels, parts["vae"].config.latent_channels),
        ("unet cross_attention_dim", unet.cross_attention_dim, text.hidden_size),
        ("text_encoder max_position_embeddings", text.max_position_embeddings, parts["tokenizer"].model_max_length),
    ):
        if got != wanted:
            raise ConfigError(f"{what} is {got}, but the other parts want {wanted}: mend the table, or load parts that fit")
    if text.vocab_size < len(parts["tokenizer"]):
        remedy = "mend the table, or load parts that fit"
        raise ConfigError(
            f"text_encoder vocab_size is {text.vocab_size}, but the tokenizer has {len(parts['tokenizer'])}: {remedy}"
        )
    return StableDiffusionPipeline(**parts)
