"""Denoisers without text: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), and latent super-resolution (arXiv:2112.10752).

Quirks: super-resolution feeds its quantising autoencoder unscaled latents, and scales the small picture as it scales the latents.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..media.processor import VaeImageProcessor
from ..outputs import ImagePipelineOutput
from ..pipelines.base import DiffusionPipeline
from ..pipelines.checks import check_generators
from ..pipelines.conditioning import Conditioning
from ..pipelines.guidance import WHOLE, Weakening
from ..pipelines.run import LATENTS, Run
from ..pipelines.tasks import Task

EXTRA = "callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs latents"


class Unconditional(DiffusionPipeline):
    """A U-Net on pixels and a scheduler; a call asks for a number of pictures."""

    family = "unconditional"
    component_names: ClassVar[tuple[str, ...]] = ("unet", "scheduler")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Floating-point type of the latents."""
        return self.unet.dtype

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Pictures to tensors and back."""
        return VaeImageProcessor()

    def default_size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("the U-Net's configuration has no sample_size, so the size of a picture is unknown")
        return (size, size) if isinstance(size, int) else tuple(size)

    def condition(self, run: Run) -> None:
        run.batch = run.args.batch_size
        check_generators(run)

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        return self.unet(x, t, return_dict=False)[0]

    def decode_output(self, run: Run) -> Any:
        """Wraps the run's pictures."""
        images: Any = self.to_pixels(run.latents)
        if run.args.output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=run.args.output_type)
        return ImagePipelineOutput(images) if run.args.return_dict else (images,)

    def to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoised sample is the picture."""
        return latents

    def preview_images(self, latents: torch.Tensor) -> list[Any]:
        """The pictures of latents as they are."""
        return self.image_processor.postprocess(self.to_pixels(latents).clamp(-1, 1), output_type="pil")


class PixelTask(Task):
    """Pictures from noise, at the size that the denoiser was made for."""

    name = "unconditional"
    callback_tensors = {"latents": LATENTS}

    def noise(self, run: Run) -> torch.Tensor:
        return self.noise_of_shape(run, (run.batch, run.pipe.unet.config.in_channels, *self.size(run)))


class DDPMPipeline(
    Unconditional,
    task=PixelTask(),
    call="batch_size generator num_inference_steps output_type return_dict",
    extra=EXTRA,
    defaults={"num_inference_steps": 1000},
):
    """Pictures without conditions, by the scheduler that is given."""


class DDIMPipeline(
    Unconditional,
    task=PixelTask(),
    call="batch_size generator eta num_inference_steps use_clipped_model_output output_type return_dict",
    extra=EXTRA,
):
    """Pictures without conditions, in few steps: whatever scheduler is given becomes a DDIM scheduler."""

    def adopt(self) -> None:
        from ..schedulers.discrete import DDIMScheduler

        if not isinstance(self.scheduler, DDIMScheduler):
            self.scheduler = DDIMScheduler.from_config(self.scheduler.config)


class LatentSuperResolution(PixelTask):
    """The small picture is an extra channel group beside latents of the same size."""

    name = "super-resolution"
    scales_channels = True  # the scheduler's input scaling reaches the small picture too
    needs_image = "super-resolution needs a picture"

    def prepare(self, run: Run) -> None:
        pipe, image = run.pipe, run.args.image
        if not isinstance(image, torch.Tensor):  # a tensor is taken as it is, in -1..1
            image = pipe.image_processor.preprocess(image)
        image = image.to(run.device, pipe.compute_dtype)
        if len(image) != run.batch:
            raise ValueError(f"{len(image)} pictures given for batch_size={run.batch}")
        shape = (run.batch, pipe.unet.config.in_channels // 2, *image.shape[-2:])
        run.latents = self.noise_of_shape(run, shape) * run.scheduler.init_noise_sigma
        run.channels = image


class LDMSuperResolutionPipeline(
    Unconditional,
    task=LatentSuperResolution(),
    call="image batch_size num_inference_steps eta generator output_type return_dict",
    extra=EXTRA,
    defaults={"num_inference_steps": 100},
):
    """Pictures four times as large, by diffusion in the latents of a quantising autoencoder."""

    component_names = ("vqvae", "unet", "scheduler")

    @property
    def image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=32, resample="lanczos", do_convert_rgb=True)

    def condition(self, run: Run) -> None:
        if isinstance(run.args.image, torch.Tensor):
            run.args.batch_size = len(run.args.image)
        super().condition(run)

    def to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vqvae.decode(latents, return_dict=False)[0].clamp(-1, 1)
