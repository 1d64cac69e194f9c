"""What the families of latent picture models share: sizes, pictures in and out, the choice of guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..media.processor import VaeImageProcessor
from ..models.layers.options import AttentionOptions
from ..outputs import ImagePipelineOutput
from .base import DiffusionPipeline
from .checks import check_generators, check_regions, prompt_count
from .conditioning import Conditioning
from .guidance import ClassifierFreeGuidance, Guidance, Weakening
from .latent import LatentFormat
from .run import Run, accepted
from .tasks import truncate_schedule

ATTENTION_INPUTS = ("regions", "image_scales", "image_tokens", "image_masks", "freeu")
"""Conditioning that reaches the layers as options."""


class ImagePipeline(DiffusionPipeline):
    """A denoiser of an autoencoder's latents.

    Class attributes:
        denoiser_name: Component that predicts.
        output: What a call returns.
        size_multiple: Heights and widths are multiples of this, in latents.
        picture_sets_size: Image-to-image works at the given picture's size unless told otherwise.
        packed: Number of latents whose channels the denoiser reads as those of one token.
        rounds_skipped_steps: Of the steps left out by ``strength`` the number is rounded down, rather than that of those made.
    """

    denoiser_name: ClassVar[str] = "unet"
    output: ClassVar[type] = ImagePipelineOutput
    picture_sets_size: ClassVar[bool] = True
    rounds_skipped_steps: ClassVar[bool] = False
    packed: ClassVar[int] = 1
    encode_prompt: Any  # of families that are told by text

    @property
    def denoiser(self) -> Any:
        """The network that predicts."""
        return getattr(self, self.denoiser_name)

    @property
    def latent_format(self) -> LatentFormat:
        """How latents relate to pictures; without an autoencoder, as those of all its family do."""
        if self.vae is not None:
            return LatentFormat.of(self.vae)
        config = self.denoiser.config
        return LatentFormat(None, (config.get("out_channels") or config.in_channels) // self.packed, 8, 1.0)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return self.latent_format.factor

    @property
    def size_multiple(self) -> int:
        """Heights and widths are multiples of this."""
        return 8

    @property
    def compute_dtype(self) -> torch.dtype:
        """Floating-point type of latents and conditions."""
        return self.dtype if self.denoiser is None else self.denoiser.dtype

    @property
    def input_channels(self) -> int:
        """Channels that the denoiser takes."""
        return self.denoiser.config.in_channels

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Pictures to tensors and back."""
        form = self.latent_format
        return VaeImageProcessor(vae_scale_factor=form.factor, vae_latent_channels=form.channels, do_convert_rgb=True)

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Masks to tensors of zeros and ones."""
        binary: dict[str, Any] = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, **binary)

    def default_size(self) -> tuple[int, int]:
        """Height and width of a picture when none are given."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.latent_format.factor, width * self.latent_format.factor

    def check(self, run: Run) -> None:
        self.check_parts(run.args)
        self.check_size(run.args)
        check_regions(run.args.regions)

    def check_parts(self, args: Any) -> None:
        """Refuses work for a part that was left out."""
        encoders = [name for name in self.component_names if name.startswith("text_encoder")]
        if self.denoiser is None:
            raise ValueError(f"{self.denoiser_name}=None: this pipeline can encode prompts only; load it with its denoiser")
        if self.vae is None and (args.output_type != "latent" or self.task.needs_image):
            raise ValueError("vae=None: this pipeline makes output_type='latent' of prompts only; load it with its autoencoder")
        if encoders and args.prompt_embeds is None and all(getattr(self, name) is None for name in encoders):
            raise ValueError(f"{encoders[0]}=None: pass prompt_embeds, or load the pipeline with its text encoders")

    def check_size(self, args: Any) -> None:
        """Refuses a height or width that the latents cannot have."""
        multiple, factor = self.size_multiple, self.latent_format.factor
        for name in ("height", "width"):
            value = getattr(args, name)
            if value is not None and value % multiple:
                raise ValueError(f"{name}={value!r} must be a positive multiple of {multiple} (and of {factor} to be met exactly)")

    def adds_noise(self, run: Run) -> bool:
        """Whether a given picture is clean, so that noise must be added where the schedule begins."""
        return True

    def truncate(self, run: Run) -> None:
        """Leaves out the part of the schedule that a given picture replaces."""
        truncate_schedule(run)

    def choose_guidance(self, run: Run) -> Guidance:
        """The guidance that the arguments ask for."""
        if (given := self.given_guidance(run, "guidance_scale", "guidance_rescale")) is not None:
            return given
        args = run.args
        guided = args.guidance_scale > 1
        return ClassifierFreeGuidance(args.guidance_scale, guidance_rescale=args.guidance_rescale) if guided else Guidance()

    def given_guidance(self, run: Run, *replaced: str) -> Guidance | None:
        """The guidance object that the caller passed; a ``ValueError`` if arguments that it replaces are given too."""
        args, parameters = run.args, self.call_signature.parameters
        if args.guidance is None:
            return None
        if not isinstance(args.guidance, Guidance):
            raise TypeError(f"guidance={args.guidance!r} is no guidance: pass an object such as sfumato.APG(10.0)")
        for name in (n for n in replaced if n in parameters):
            if getattr(args, name) != parameters[name].default:
                raise ValueError(f"{name}={getattr(args, name)!r} is given beside guidance, which has its own: leave it out")
        return args.guidance

    def condition(self, run: Run) -> None:
        args = run.args
        run.batch = prompt_count(args) * args.num_images_per_prompt
        check_generators(run)
        run.guidance = self.choose_guidance(run)
        prompts = self.embed(run, "negative" in run.guidance.layout)
        branches = [prompts[name] for name in run.guidance.layout]
        stacked = {key: torch.cat([branch[key] for branch in branches]) for key in branches[0]}
        run.conditioning = Conditioning(stacked)

    def embed(self, run: Run, guided: bool) -> dict[str, dict[str, torch.Tensor]]:
        """Encodes the prompts of a run: conditioning of the ``"positive"`` and, if ``guided``, of the ``"negative"`` ones.

        Each tensor has one row per picture.
        """
        raise NotImplementedError

    def encoded_prompts(self, run: Run, guided: bool) -> dict[str, tuple[torch.Tensor, ...]]:
        """What ``encode_prompt`` makes of a run's arguments: tensors of the ``"positive"`` and of the ``"negative"`` prompts."""
        given = {name: getattr(run.args, name) for name in accepted(type(self).encode_prompt) if hasattr(run.args, name)}
        found = self.encode_prompt(**given, device=run.device, do_classifier_free_guidance=guided)
        return {"positive": found[::2], **({"negative": found[1::2]} if guided else {})}

    def placed(self, found: Sequence[torch.Tensor | None], device: torch.device | None, each: int) -> Any:
        """Embeddings with a row for each prompt -> with ``each`` rows for it, ready for the denoiser."""
        ready = (None if x is None else x.to(device or self.device, self.compute_dtype) for x in found)
        return tuple(None if x is None else x.repeat_interleave(each, dim=0) for x in ready)

    def add_regions(self, run: Run, prompts: dict[str, dict[str, torch.Tensor]], encode: Callable[[str], torch.Tensor]) -> None:
        """Adds the prompts of regions to encoded ones; ``encode`` gives the tokens (1, N, D) of one.

        The tokens of the regions follow those of the prompt, which holds everywhere.
        """
        if run.args.regions is None:
            return
        height, width = self.task.size(run)
        texts, masks = zip(*run.args.regions, strict=True)
        areas = [self.mask_processor.preprocess(mask, height=height, width=width) for mask in masks]  # (1, 1, H, W) each
        held = torch.cat([torch.ones_like(areas[0]), *areas], dim=1).to(run.device)
        for name, tensors in prompts.items():
            own = tensors["encoder_hidden_states"]
            others = [encode(text).to(own).expand_as(own) if name == "positive" else own for text in texts]
            tensors["encoder_hidden_states"] = torch.cat([own, *others], dim=1)
            tensors["regions"] = held.expand(len(own), -1, -1, -1)

    def decode_output(self, run: Run, **vae_extras: torch.Tensor) -> Any:
        """Decodes the run's latents and wraps the pictures."""
        args = run.args
        if args.output_type == "latent":
            return self.wrap(run, self.pack(run.latents))
        used = vae_extras if type(self.vae).__name__ == "AsymmetricAutoencoderKL" else {}
        extras = {k: v.to(run.device, self.vae.dtype) for k, v in used.items()}
        decoded = self.latent_format.decode(run.latents.to(self.vae.dtype), args.generator, **extras)
        return self.wrap_pictures(run, decoded)

    def wrap_pictures(self, run: Run, decoded: torch.Tensor) -> Any:
        """Wraps decoded pictures (B, 3, H, W)."""
        return self.wrap(run, self.image_processor.postprocess(decoded, output_type=run.args.output_type))

    def wrap(self, run: Run, images: Any) -> Any:
        """What the call returns."""
        return self.output(images) if run.args.return_dict else (images,)

    def preview_images(self, latents: torch.Tensor) -> list[Any]:
        """Small approximate pictures of latents."""
        pictures = self.latent_format.preview(latents)  # already in 0..1
        return self.image_processor.postprocess(pictures, output_type="pil", do_denormalize=[False] * len(latents))


def network_of(pipe: ImagePipeline, weakening: Weakening) -> nn.Module:
    """The network that makes a prediction."""
    return pipe.denoiser if weakening.network is None else weakening.network


def attention_options(
    conditioning: Conditioning, weakening: Weakening, size: tuple[int, int] | None = None
) -> AttentionOptions | None:
    """What the conditioning and a weakening ask of the layers, with the picture's ``size`` in tokens; ``None`` for nothing."""
    regions, scales, freeu = (conditioning.get(name) for name in ("regions", "image_scales", "freeu"))
    tokens, masks = conditioning.several("image_tokens"), conditioning.several("image_masks")
    if regions is None and freeu is None and not tokens and weakening.perturbation is None:
        return None
    return AttentionOptions(weakening.perturbation, regions, tokens, scales, masks, freeu, size)


def region_options(conditioning: Conditioning, size: tuple[int, int] | None = None) -> AttentionOptions | None:
    """What a control network is asked: to keep prompts to their regions."""
    regions = conditioning.get("regions")
    return None if regions is None else AttentionOptions(regions=regions, size=size)
