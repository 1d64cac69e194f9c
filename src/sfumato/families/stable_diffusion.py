"""Stable Diffusion 1 and 2: latent diffusion with a U-Net and a CLIP text encoder (arXiv:2112.10752).

Tasks by the denoiser's channels: 4 (text, picture, inpainting by pasting), 5 (depth), 7 (x4 upscaling), 8 (edit by instruction),
9 (inpainting).

Quirks, kept because they change the result of valid calls: the constructor sets ``steps_offset`` to 1 and ``clip_sample`` to false
on schedulers that say otherwise, and inpainting skips PNDM's Runge-Kutta steps (``adopts``); nine-channel inpainting at strength 1
does not encode its source; the instruction pipeline takes the posterior's mode. Not reproduced, because they are faults: pictures
shared out in the order a, b, a, b over prompts in the order a, a, b, b; inpainting and upscaling with one generator per picture
that draw the source's latents, or the low-resolution noise, from the first generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..media.processor import VaeImageProcessor
from ..outputs import ImagePipelineOutput, StableDiffusionPipelineOutput
from ..pipelines.base import DiffusionPipeline
from ..pipelines.conditioning import Conditioning
from ..pipelines.guidance import ClassifierFreeGuidance, EditGuidance, NoGuidance
from ..pipelines.latent import LatentFormat
from ..pipelines.run import Run
from ..pipelines.tasks import DepthToImage, ImageToImage, Inpaint, InstructEdit, Task, check_count, per_picture
from ..pipelines.text import SYNTAXES, encode_clip
from ..random import randn

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
CHECKER = ("safety_checker", "feature_extractor")
EXTRA = "prompt_syntax callback callback_steps"

Texts = str | list[str] | None


class StableDiffusion(DiffusionPipeline):
    """The family: how its parts are used, whatever the task.

    ``output`` is what a call returns; ``adopts`` the scheduler configuration that the constructor enforces where the key exists.
    """

    component_names: ClassVar[tuple[str, ...]] = (*PARTS, *CHECKER, "image_encoder")
    optional_components: ClassVar[tuple[str, ...]] = (*CHECKER, "image_encoder")
    options = {"requires_safety_checker": True}
    output: ClassVar[type] = StableDiffusionPipelineOutput
    adopts: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def adopt(self) -> None:
        scheduler = self.scheduler
        changes = {k: v for k, v in self.adopts.items() if k in scheduler.config and scheduler.config[k] != v}
        if changes:
            self.scheduler = type(scheduler).from_config({**scheduler.config, **changes})
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError("a safety_checker needs its feature_extractor: pass both, or safety_checker=None")

    # --- data -------------------------------------------------------------------------------------------------------

    @property
    def latent_format(self) -> LatentFormat:
        """How latents relate to pictures."""
        return LatentFormat.of(self.vae)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return self.latent_format.factor

    @property
    def compute_dtype(self) -> torch.dtype:
        """Floating-point type of latents and conditions."""
        return self.unet.dtype

    @property
    def input_channels(self) -> int:
        """Channels that the denoiser takes."""
        return self.unet.config.in_channels

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Pictures to tensors and back."""
        return VaeImageProcessor(vae_scale_factor=self.latent_format.factor)

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Masks to tensors of zeros and ones."""
        binary: dict[str, Any] = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, **binary)

    def default_size(self) -> tuple[int, int]:
        """Height and width of a picture when none are given."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.latent_format.factor, width * self.latent_format.factor

    # --- verbs ------------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        args, factor = run.args, self.latent_format.factor
        for name in ("height", "width"):
            value = getattr(args, name)
            if value is not None and (not isinstance(value, int) or value < 8 or value % 8):
                raise ValueError(f"{name}={value!r} must be a positive multiple of 8 (and of {factor} to be met exactly)")
        check_prompts(args)
        config = self.unet.config
        check_width(args, ("prompt_embeds", "negative_prompt_embeds"), config.get("encoder_hid_dim") or config.cross_attention_dim)
        if args.ip_adapter_image is not None or args.ip_adapter_image_embeds is not None:
            raise ValueError("ip_adapter_image is given, but no IP-Adapter is loaded in this pipeline")
        if args.cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs={args.cross_attention_kwargs!r} reaches no adapter: leave it out")

    def condition(self, run: Run) -> None:
        args = run.args
        run.batch = prompt_count(args) * args.num_images_per_prompt
        check_generators(run)
        scale, embedded_width = args.guidance_scale, self.unet.config.time_cond_proj_dim
        guided = scale > 1 and embedded_width is None
        if guided:
            run.guidance = ClassifierFreeGuidance(scale, args.guidance_rescale)
        taken = (
            "num_images_per_prompt",
            "negative_prompt",
            "prompt_embeds",
            "negative_prompt_embeds",
            "clip_skip",
            "prompt_syntax",
        )
        options = {name: getattr(args, name) for name in taken}
        positive, negative = self.encode_prompt(args.prompt, run.device, do_classifier_free_guidance=guided, **options)
        states = positive if negative is None else torch.cat([negative, positive])
        tensors: dict[str, torch.Tensor | None] = {"encoder_hidden_states": states}
        if embedded_width is not None:
            weights = torch.full((run.batch,), float(scale) - 1, device=run.device)
            tensors["timestep_cond"] = guidance_embedding(weights, embedded_width).to(states.dtype)
        run.conditioning = Conditioning(tensors)

    def encode_prompt(
        self, prompt: Texts, device: torch.device | None = None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True, negative_prompt: Texts = None, prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None, *, clip_skip: int | None = None, prompt_syntax: str = "plain",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Encodes prompts, once for all the pictures of a prompt.

        Returns:
            Embeddings ``(B * num_images_per_prompt, N, D)`` of the prompts and, under guidance, of the negative prompts.
        """
        device = device or self.device

        def encode(texts: list[str], length: int | None = None) -> torch.Tensor:
            return encode_clip(self.tokenizer, self.text_encoder, texts, clip_skip, prompt_syntax, length)

        negative = negative_prompt_embeds
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds = encode(prompts, None if negative is None else negative.shape[1])
        else:
            prompts = [""] * len(prompt_embeds)
        if do_classifier_free_guidance and negative is None:
            negative = encode(negative_texts(negative_prompt, len(prompts)), prompt_embeds.shape[1])
            if negative.shape[1] > prompt_embeds.shape[1]:
                prompt_embeds = encode(prompts, negative.shape[1])

        def place(embeds: torch.Tensor) -> torch.Tensor:
            embeds = embeds.to(device, self.compute_dtype)
            return embeds.repeat_interleave(num_images_per_prompt, dim=0) if num_images_per_prompt > 1 else embeds

        return place(prompt_embeds), place(negative) if do_classifier_free_guidance and negative is not None else None

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.unet(x, t, **conditioning, return_dict=False)[0]

    def decode_output(self, run: Run, **vae_extras: torch.Tensor) -> Any:
        """Decodes the run's latents, asks the safety checker, and wraps the pictures."""
        args, flags = run.args, None
        if args.output_type == "latent":
            images: Any = run.latents
        else:
            used = vae_extras if type(self.vae).__name__ == "AsymmetricAutoencoderKL" else {}
            extras = {k: v.to(run.device, self.vae.dtype) for k, v in used.items()}
            decoded = self.latent_format.decode(run.latents.to(self.vae.dtype), args.generator, **extras)
            decoded, flags = self.run_safety_checker(decoded)
            normal = [not flag for flag in flags] if flags is not None else [True] * len(decoded)
            images = self.image_processor.postprocess(decoded, output_type=args.output_type, do_denormalize=normal)
        if self.output is StableDiffusionPipelineOutput:
            return StableDiffusionPipelineOutput(images, flags) if args.return_dict else (images, flags)
        return self.output(images) if args.return_dict else (images,)

    def run_safety_checker(self, image: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Blackens pictures (B, 3, H, W) that the checker objects to; returns its verdicts, ``None`` without a checker."""
        if getattr(self, "safety_checker", None) is None:
            return image, None
        pictures = self.image_processor.postprocess(image, output_type="pil")
        pixels = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(image.device, self.compute_dtype)
        return self.safety_checker(images=image, clip_input=pixels)

    def preview_images(self, latents: torch.Tensor) -> list[Any]:
        """Small approximate pictures of latents."""
        pictures = self.latent_format.preview(latents)  # already in 0..1
        return self.image_processor.postprocess(pictures, output_type="pil", do_denormalize=[False] * len(latents))


def check_prompts(args: Any) -> None:
    """Refuses prompts and embeddings that contradict each other or cannot be encoded."""
    if args.prompt_syntax not in SYNTAXES:
        raise ValueError(f"prompt_syntax={args.prompt_syntax!r} is unknown: expected one of {SYNTAXES}")
    if (args.prompt is None) == (args.prompt_embeds is None):
        both = "both" if args.prompt is not None else "neither"
        raise ValueError(f"{both} of prompt and prompt_embeds given: pass exactly one")
    if args.negative_prompt is not None and args.negative_prompt_embeds is not None:
        raise ValueError("both negative_prompt and negative_prompt_embeds are given: pass one")
    for name in ("prompt", "negative_prompt"):
        text, embeds = getattr(args, name), getattr(args, f"{name}_embeds")
        if text is not None and not isinstance(text, str):
            if not isinstance(text, (list, tuple)) or not all(isinstance(item, str) for item in text):
                raise ValueError(f"{name} must be a text or a list of texts, not {type(text).__name__}")
            if not text:
                raise ValueError(f"{name}=[] is empty: pass at least one text")
        if embeds is not None:
            if not (isinstance(embeds, torch.Tensor) and embeds.ndim == 3):
                raise ValueError(f"{name}_embeds must be a tensor (B, N, D), not {getattr(embeds, 'shape', type(embeds).__name__)}")
            if not bool(torch.isfinite(embeds).all()):
                raise ValueError(f"{name}_embeds holds NaN or infinite values: encode the prompt in float32 or bfloat16")
    shapes = [tuple(e.shape) for e in (args.prompt_embeds, args.negative_prompt_embeds) if e is not None]
    if len(set(shapes)) == 2:
        raise ValueError(f"prompt_embeds {shapes[0]} and negative_prompt_embeds {shapes[1]} differ in shape")
    check_count(args, "num_images_per_prompt")


def check_width(args: Any, names: tuple[str, ...], width: int | Sequence[int]) -> None:
    """Refuses embeddings of another width than the denoiser's ``width``, one for all its levels or one for each."""
    widths = {width} if isinstance(width, int) else set(width)
    for name in names:
        embeds = getattr(args, name)
        if embeds is not None and widths != {embeds.shape[-1]}:
            expected = " or ".join(map(str, sorted(widths)))
            raise ValueError(f"{name} is {embeds.shape[-1]} wide, this denoiser reads {expected}: encode with its own text encoder")


def prompt_count(args: Any) -> int:
    """Number of prompts of a call."""
    if args.prompt_embeds is not None:
        return len(args.prompt_embeds)
    return 1 if isinstance(args.prompt, str) else len(args.prompt)


def negative_texts(negative: str | list[str] | None, count: int) -> list[str]:
    """One negative text per prompt."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    if len(negative) != count:
        raise ValueError(f"negative_prompt has {len(negative)} texts for {count} prompts: pass one text, or one per prompt")
    return list(negative)


def check_generators(run: Run) -> None:
    """Refuses a list of generators that does not have one per picture."""
    generator = run.args.generator
    each = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in each):
        raise TypeError(f"generator={generator!r} must be torch.Generator().manual_seed(seed), or a list of such")
    if isinstance(generator, (list, tuple)) and len(generator) != run.batch:
        raise ValueError(f"{len(generator)} generators for {run.batch} pictures: pass one, or one per picture")


def guidance_embedding(weights: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000 times the guidance weights (arXiv:2310.04378, appendix), ``(B,)`` -> ``(B, width)``."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=weights.device) * -(math.log(10000.0) / (half - 1)))
    angles = weights[:, None] * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))


class StableDiffusionPipeline(
    StableDiffusion,
    task=Task(),
    call="prompt height width num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta "
    "generator latents prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict "
    "cross_attention_kwargs guidance_rescale clip_skip callback_on_step_end callback_on_step_end_tensor_inputs",
    extra=EXTRA,
):
    """Pictures from text."""


class StableDiffusionImg2ImgPipeline(
    StableDiffusion,
    task=ImageToImage(),
    call="prompt image strength num_inference_steps timesteps sigmas guidance_scale negative_prompt num_images_per_prompt eta "
    "generator prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict "
    "cross_attention_kwargs clip_skip callback_on_step_end callback_on_step_end_tensor_inputs",
    extra=EXTRA + " guidance_rescale",
):
    """Pictures from a picture and text."""


class StableDiffusionInpaintPipeline(
    StableDiffusion,
    task=Inpaint(),
    call="prompt image mask_image masked_image_latents height width padding_mask_crop strength num_inference_steps timesteps "
    "sigmas guidance_scale negative_prompt num_images_per_prompt eta generator latents prompt_embeds negative_prompt_embeds "
    "ip_adapter_image ip_adapter_image_embeds output_type return_dict cross_attention_kwargs clip_skip callback_on_step_end "
    "callback_on_step_end_tensor_inputs",
    extra=EXTRA + " guidance_rescale",
    defaults={"strength": 1.0},
):
    """Paints a masked region anew."""

    adopts = {"steps_offset": 1, "skip_prk_steps": True}

    def adopt(self) -> None:
        super().adopt()
        if self.input_channels not in (4, 9):
            raise ValueError(f"inpainting needs a U-Net with 4 or 9 input channels, this one has {self.input_channels}")


class StableDiffusionDepth2ImgPipeline(
    StableDiffusion,
    task=DepthToImage(),
    call="prompt image depth_map strength num_inference_steps guidance_scale negative_prompt num_images_per_prompt eta generator "
    "prompt_embeds negative_prompt_embeds output_type return_dict cross_attention_kwargs clip_skip callback_on_step_end "
    "callback_on_step_end_tensor_inputs",
    extra=EXTRA + " guidance_rescale",
):
    """Pictures from a picture's depth and text."""

    component_names = (*PARTS, "depth_estimator", "feature_extractor")
    optional_components = ()
    options = {}
    output = ImagePipelineOutput
    adopts = {}
    safety_checker = None

    def depth_channel(self, run: Run) -> torch.Tensor:
        """Depth of the pictures as a channel in -1..1, (B, 1, h, w) at the size of the latents."""
        args = run.args
        height, width = self.image_processor.preprocess(args.image).shape[-2:]
        if args.depth_map is None:
            raw = args.image if isinstance(args.image, (list, tuple)) or not hasattr(args.image, "size") else [args.image]
            pixels = self.feature_extractor(images=raw, return_tensors="pt").pixel_values.to(run.device, self.compute_dtype)
            depth = self.depth_estimator(pixels).predicted_depth
        else:
            depth = args.depth_map.to(run.device, self.compute_dtype)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        depth = torch.nn.functional.interpolate(depth.unsqueeze(1).float(), size=size, mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        depth = 2.0 * (depth - low) / (high - low) - 1.0
        return per_picture(depth.to(self.compute_dtype), run.batch, "depth map")


class StableDiffusionInstructPix2PixPipeline(
    StableDiffusion,
    task=InstructEdit(),
    call="prompt image num_inference_steps guidance_scale image_guidance_scale negative_prompt num_images_per_prompt eta "
    "generator latents prompt_embeds negative_prompt_embeds ip_adapter_image ip_adapter_image_embeds output_type return_dict "
    "callback_on_step_end callback_on_step_end_tensor_inputs cross_attention_kwargs",
    extra=EXTRA + " clip_skip",
    defaults={"num_inference_steps": 100},
):
    """Edits a picture as an instruction says."""

    adopts = {}

    def condition(self, run: Run) -> None:
        super().condition(run)
        args, states = run.args, run.conditioning["encoder_hidden_states"]
        if args.guidance_scale > 1.0 and args.image_guidance_scale >= 1.0:
            run.guidance = EditGuidance(args.guidance_scale, args.image_guidance_scale)
            negative, positive = states.chunk(2)
            states = torch.cat([positive, negative, negative])
        else:
            run.guidance, states = NoGuidance(), states[-run.batch :]
        run.conditioning = run.conditioning.replace(encoder_hidden_states=states)


class NoisyUpscale(Task):
    """Condition on a low-resolution picture with noise of a known level added, as extra channels."""

    name = "upscale"
    needs_image = "upscaling needs a picture"

    def check(self, run: Run) -> None:
        super().check(run)
        limit = run.pipe.max_noise_level
        if not 0 <= run.args.noise_level <= limit:
            raise ValueError(f"noise_level={run.args.noise_level} must lie in 0..{limit}")

    def prepare(self, run: Run) -> None:
        pipe, args = run.pipe, run.args
        image = pipe.image_processor.preprocess(args.image).to(run.device, pipe.compute_dtype)  # (b, 3, h, w) in -1..1
        if isinstance(args.generator, list):  # each picture's noise comes from its own generator
            image = per_picture(image, run.batch, "image")
        level = torch.tensor([args.noise_level], dtype=torch.long, device=run.device)
        noise = randn(image.shape, generator=args.generator, device=run.device, dtype=image.dtype)
        image = per_picture(pipe.low_res_scheduler.add_noise(image, noise, level), run.batch, "image")
        run.channels = torch.cat([image] * run.guidance.branches)
        run.conditioning = run.conditioning.replace(class_labels=level.repeat(len(run.channels)))
        shape = (run.batch, pipe.latent_format.channels, *image.shape[-2:])
        run.latents = self.noise_of_shape(run, shape) * run.scheduler.init_noise_sigma


class StableDiffusionUpscalePipeline(
    StableDiffusion,
    task=NoisyUpscale(),
    call="prompt image num_inference_steps guidance_scale noise_level negative_prompt num_images_per_prompt eta generator latents "
    "prompt_embeds negative_prompt_embeds output_type return_dict callback callback_steps cross_attention_kwargs clip_skip",
    extra="prompt_syntax callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale",
    defaults={"num_inference_steps": 75, "guidance_scale": 9.0},
):
    """Pictures four times as large, from a small picture and text."""

    component_names = (*PARTS[:-1], "low_res_scheduler", "scheduler", *CHECKER, "watermarker")
    optional_components = (*CHECKER, "watermarker")
    options = {"max_noise_level": 350}
    adopts = {}

    @property
    def max_noise_level(self) -> int:
        """Largest noise level that the denoiser was trained with."""
        return self._options["max_noise_level"]

    @property
    def image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.latent_format.factor, resample="bicubic")


class StableDiffusionImageVariationPipeline(
    StableDiffusion,
    task=Task(),
    call="image! height width num_inference_steps guidance_scale num_images_per_prompt eta generator latents output_type "
    "return_dict callback callback_steps",
    extra="callback_on_step_end callback_on_step_end_tensor_inputs guidance_rescale",
):
    """Variations of a picture, conditioned on its CLIP embedding."""

    component_names = ("vae", "image_encoder", "unet", "scheduler", "safety_checker", "feature_extractor")
    optional_components = ("safety_checker",)
    adopts = {}

    def adopt(self) -> None:
        DiffusionPipeline.adopt(self)

    def check(self, run: Run) -> None:
        run.args.prompt = "picture"
        super().check(run)

    def condition(self, run: Run) -> None:
        args, pixels = run.args, run.args.image
        if not isinstance(pixels, torch.Tensor):
            pixels = self.feature_extractor(images=pixels, return_tensors="pt").pixel_values
        weight = next(self.image_encoder.parameters())
        embeds = self.image_encoder(pixels.to(weight.device, weight.dtype)).image_embeds.unsqueeze(1)  # (B, 1, D)
        run.batch = len(embeds) * args.num_images_per_prompt
        check_generators(run)
        embeds = embeds.to(self.compute_dtype).repeat_interleave(args.num_images_per_prompt, dim=0)
        if args.guidance_scale > 1:
            run.guidance = ClassifierFreeGuidance(args.guidance_scale, args.guidance_rescale)
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        run.conditioning = Conditioning({"encoder_hidden_states": embeds})
