"""Tasks: what the user asks of a family. A task has no state; what a run needs later is kept on the run.

Phases, in the order of a call: ``check`` -> the family's ``condition`` -> ``schedule`` -> ``prepare`` (pictures, latents, noise;
the only phase that draws from the generators besides the scheduler's steps) -> per step ``time``, ``after_step`` -> ``finish``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..random import randn
from .checks import check_number
from .run import CHANNELS, EMBEDS, LATENTS, NEGATIVE_EMBEDS, Named, Run, accepted


class Task:
    """Text to picture, and the parts that the other tasks share."""

    name: ClassVar[str] = "text-to-image"
    arguments: ClassVar[str] = "height width latents"
    callback_tensors: ClassVar[dict[str, Named]] = {
        "latents": LATENTS, "prompt_embeds": EMBEDS, "negative_prompt_embeds": NEGATIVE_EMBEDS,
    }  # fmt: skip
    scales_channels: ClassVar[bool] = False
    needs_image: ClassVar[str] = ""  # why a call without a picture, or its mask, cannot work, where it cannot

    def check(self, run: Run) -> None:
        """Refuses arguments that cannot work, before any work is done."""
        args = run.args
        needed: tuple[str, ...] = ("image", "mask_image") if "mask_image" in self.arguments else ("image",)
        for name in needed if self.needs_image else ():
            if getattr(args, name) is None:
                raise ValueError(f"{name}=None: {self.needs_image}")
        offered = run.callback_tensors
        unknown = [n for n in args.callback_on_step_end_tensor_inputs or () if n not in list(offered)]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; this pipeline offers {', '.join(offered)}")

    def size(self, run: Run) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        default = next(filter(None, (adapter.size(run) for adapter in run.pipe.adapters)), None) or run.pipe.default_size()
        return run.args.height or default[0], run.args.width or default[1]

    def area(self, run: Run) -> dict[str, Any]:
        """How given pictures are fitted: arguments of an image processor's ``preprocess``."""
        height, width = self.size(run)
        return {"height": height, "width": width}

    def schedule(self, run: Run) -> None:
        """Sets the timesteps of the run's scheduler."""
        args, scheduler = run.args, run.scheduler
        takes = accepted(type(scheduler).set_timesteps)
        custom = {k: v for k in ("timesteps", "sigmas") if (v := getattr(args, k)) is not None}
        if len(custom) > 1:
            raise ValueError("timesteps and sigmas are both given: pass one of them")
        remedy = "a scheduler that does is EulerDiscreteScheduler"
        for name in custom.keys() - takes:
            raise ValueError(f"{type(scheduler).__name__} takes no custom {name}; {remedy}")
        if "timesteps" in custom:
            check_number("timesteps", max(custom["timesteps"]), 0, high=scheduler.config.get("num_train_timesteps", math.inf))
        given = custom or {"num_inference_steps": args.num_inference_steps}
        scheduler.set_timesteps(**run.pipe.schedule_options(run, given), device=run.device)
        run.timesteps = scheduler.timesteps
        self.truncate(run)
        run.pipe.limit(run)
        takes = accepted(type(scheduler).step)
        options = {"eta": args.eta, "generator": args.generator, "use_clipped_model_output": args.use_clipped_model_output}
        run.step_options = {k: v for k, v in options.items() if k in takes and v is not None}

    def truncate(self, run: Run) -> None:
        """Leaves out steps at the beginning."""

    def prepare(self, run: Run) -> None:
        """Makes the starting latents."""
        run.latents = self.noise(run) * run.scheduler.init_noise_sigma

    def noise(self, run: Run) -> torch.Tensor:
        """The caller's latents, or fresh noise in the shape of the latents, (B, C, h, w)."""
        height, width = self.size(run)
        return self.noise_of_shape(run, run.pipe.latent_format.shape(run.batch, height, width))

    def noise_of_shape(self, run: Run, shape: tuple[int, ...]) -> torch.Tensor:
        """As :meth:`noise`, for a given shape, which the caller's latents must have."""
        dtype, given = run.pipe.compute_dtype, run.args.latents
        if given is None:
            return randn(shape, generator=run.args.generator, device=run.device, dtype=dtype)
        packed = tuple(run.pipe.pack(torch.empty(shape, device="meta")).shape)
        if tuple(given.shape) not in (shape, packed):
            raise ValueError(f"latents have shape {tuple(given.shape)}, expected {packed} for this batch and size")
        return run.pipe.unpack(given, *shape[-2:]).to(run.device, dtype)

    def time(self, run: Run) -> torch.Tensor:
        """What the denoiser is told as time, a scalar tensor."""
        return run.timesteps[run.index]

    def after_step(self, run: Run, latents: torch.Tensor) -> torch.Tensor:
        """Changes the latents after a scheduler step."""
        return latents

    def finish(self, run: Run) -> Any:
        """Decodes and wraps the result."""
        return run.pipe.decode_output(run)


def begin_at(run: Run, step: int) -> None:
    """Leaves out the steps before ``step``."""
    begin = step * run.scheduler.order
    run.timesteps = run.scheduler.timesteps[begin:]
    if hasattr(run.scheduler, "set_begin_index"):
        run.scheduler.set_begin_index(begin)


def truncate_schedule(run: Run) -> None:
    """Keeps the last ``strength`` part of the schedule (SDEdit, arXiv:2108.01073).

    Families differ in what is rounded down: the steps that are made, or those that are left out.
    """
    custom = run.args.timesteps or run.args.sigmas
    steps = len(run.timesteps) // run.scheduler.order if custom else run.args.num_inference_steps
    made = steps * run.args.strength
    begin_at(run, int(steps - min(made, steps)) if run.pipe.rounds_skipped_steps else steps - min(int(made), steps))
    if len(run.timesteps) == 0:
        remedy = f"raise strength to {1 / max(steps, 1):.2g} or above, or raise num_inference_steps"
        raise ValueError(f"strength={run.args.strength} leaves none of {steps} steps to make: {remedy}")


def per_picture(tensor: torch.Tensor, batch: int, what: str) -> torch.Tensor:
    """Repeats each row until there is one per picture, in the order of the prompts: a, a, b, b."""
    rows = len(tensor)
    if batch % rows:
        raise ValueError(f"{rows} {what}(s) cannot be shared out evenly over {batch} pictures: give 1 or one per prompt")
    return tensor if rows == batch else tensor.repeat_interleave(batch // rows, dim=0)


def encode_pictures(run: Run, image: torch.Tensor) -> torch.Tensor:
    """Encodes pictures (B, 3, H, W) to one latent per picture of the run; latents pass through.

    With one generator a shared picture is encoded (drawn) once; with a list, once for each generator.
    """
    latents, generator = image.to(run.device), run.args.generator
    if image.shape[1] != run.pipe.latent_format.channels:
        if isinstance(generator, list):
            latents = per_picture(latents, run.batch, "image")
        latents = run.pipe.latent_format.encode(latents, generator)
    return per_picture(latents.to(run.pipe.compute_dtype), run.batch, "image")


class ImageToImage(Task):
    """Noise the given picture up to a strength, then denoise it (SDEdit, arXiv:2108.01073)."""

    name = "image-to-image"
    arguments = "image strength height width"
    needs_image = "this pipeline starts from a picture; pass one, or use the text-to-image pipeline"

    def size(self, run: Run) -> tuple[int, int]:
        if run.pipe.picture_sets_size and not (run.args.height and run.args.width):
            image = run.pipe.image_processor.preprocess(run.args.image)
            unit = run.pipe.latent_format.factor if image.shape[1] == run.pipe.latent_format.channels else 1
            return run.args.height or image.shape[-2] * unit, run.args.width or image.shape[-1] * unit
        return super().size(run)

    def truncate(self, run: Run) -> None:
        run.pipe.truncate(run)

    def encode(self, run: Run, image: torch.Tensor) -> torch.Tensor:
        """Latents of pictures (b, 3, H, W), one for each picture of the run."""
        return encode_pictures(run, image)

    def prepare(self, run: Run) -> None:
        height, width = self.size(run)
        latents = self.encode(run, run.pipe.image_processor.preprocess(run.args.image, height=height, width=width))
        if run.args.latents is not None:
            latents = self.noise_of_shape(run, tuple(latents.shape))
        elif run.pipe.adds_noise(run):
            noise = randn(latents.shape, generator=run.args.generator, device=run.device, dtype=latents.dtype)
            latents = run.scheduler.add_noise(latents, noise, run.timesteps[:1].repeat(run.batch))
        run.latents = latents


class DepthToImage(ImageToImage):
    """Image-to-image with the picture's depth as a fifth channel."""

    name = "depth-to-image"
    arguments = "image depth_map strength height width"
    callback_tensors = {**Task.callback_tensors, "depth_mask": CHANNELS}

    def prepare(self, run: Run) -> None:
        depth = run.pipe.depth_channel(run)  # (B, 1, h, w)
        run.channels = torch.cat([depth] * run.guidance.branches)
        super().prepare(run)


@dataclass(frozen=True)
class Painting:
    """What inpainting keeps: latents of the source, the noise it started from, the mask, and how to paste the result back."""

    source: torch.Tensor | None
    noise: torch.Tensor
    mask: torch.Tensor
    image: torch.Tensor
    pixel_mask: torch.Tensor
    by_channels: bool  # whether the denoiser reads the mask
    crop: tuple[int, int, int, int] | None


def _channels(run: Run) -> torch.Tensor:
    assert run.channels is not None  # the denoiser reads the mask as one
    return run.channels


def _mask(run: Run) -> torch.Tensor:
    return _channels(run)[:, :1] if run.kept.by_channels else run.kept.mask


def _set_mask(run: Run, value: torch.Tensor) -> None:
    if run.kept.by_channels:
        run.channels = torch.cat([value, _channels(run)[:, 1:]], dim=1)
    else:
        run.kept = replace(run.kept, mask=value)


def _masked_latents(run: Run) -> torch.Tensor | None:
    return _channels(run)[:, 1:] if run.kept.by_channels else None


def _set_masked_latents(run: Run, value: torch.Tensor) -> None:
    if run.kept.by_channels:
        run.channels = torch.cat([_channels(run)[:, :1], value], dim=1)


class Inpaint(ImageToImage):
    """Paint the masked region anew: by extra channels where the denoiser has them, else by pasting the source after each step."""

    name = "inpaint"
    arguments = "image mask_image masked_image_latents height width padding_mask_crop strength latents"
    callback_tensors = {
        **Task.callback_tensors,
        "mask": Named(_mask, _set_mask),
        "masked_image_latents": Named(_masked_latents, _set_masked_latents),
    }
    needs_image = "inpainting needs a picture and a mask of the region to paint anew"

    def __init__(self, masks_first: bool = False) -> None:
        self.masks_first = masks_first  # whether the masked picture is drawn before the picture and the noise

    def check(self, run: Run) -> None:
        super().check(run)
        if run.args.padding_mask_crop is not None:
            if run.args.output_type != "pil":
                raise ValueError(f"padding_mask_crop pastes PIL pictures: output_type={run.args.output_type!r} must be 'pil'")
            for name in ("image", "mask_image"):
                if not hasattr(getattr(run.args, name), "size") or isinstance(getattr(run.args, name), torch.Tensor):
                    raise ValueError(f"padding_mask_crop needs {name} as one PIL picture")

    def size(self, run: Run) -> tuple[int, int]:
        return super().size(run) if run.pipe.adapters else Task.size(self, run)

    def area(self, run: Run) -> dict[str, Any]:
        (height, width), pad = self.size(run), run.args.padding_mask_crop
        crop = None if pad is None else run.pipe.mask_processor.get_crop_region(run.args.mask_image, width, height, pad=pad)
        mode = "default" if pad is None else "fill"
        return {"height": height, "width": width, "resize_mode": mode, "crops_coords": crop}

    def prepare(self, run: Run) -> None:
        args, pipe = run.args, run.pipe
        area = self.area(run)
        image = pipe.image_processor.preprocess(args.image, **area).float()
        pixel_mask = pipe.mask_processor.preprocess(args.mask_image, **area)
        hidden = self._mask_latents(run, image, pixel_mask) if self.masks_first else None
        by_channels, noisy = pipe.input_channels == 9, pipe.adds_noise(run)
        needed = not by_channels or (args.latents is None and (args.strength < 1 or not noisy))
        source = self.encode(run, image) if needed else None
        noise = self.noise(run)
        if not noisy and source is not None:
            run.latents = source
        elif args.strength < 1 and args.latents is None and source is not None:
            run.latents = run.scheduler.add_noise(source, noise, run.timesteps[:1].repeat(run.batch))
        else:
            run.latents = noise * run.scheduler.init_noise_sigma
        mask, masked = hidden or self._mask_latents(run, image, pixel_mask)
        if by_channels:
            run.channels = torch.cat([torch.cat([mask, masked], dim=1)] * run.guidance.branches)
        run.kept = Painting(source, noise, mask, image, pixel_mask, by_channels, area["crops_coords"])

    def _mask_latents(self, run: Run, image: torch.Tensor, pixel_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, 1, h, w) and the latents of the masked picture (B, C, h, w)."""
        form, masked = run.pipe.latent_format, run.args.masked_image_latents
        if masked is None:
            masked = image if image.shape[1] == form.channels else image * (pixel_mask < 0.5)
        size = [side // form.factor for side in pixel_mask.shape[-2:]]
        mask = torch.nn.functional.interpolate(pixel_mask, size=size).to(run.device, run.pipe.compute_dtype)
        return per_picture(mask, run.batch, "mask"), self.encode(run, masked)

    def after_step(self, run: Run, latents: torch.Tensor) -> torch.Tensor:
        kept: Painting = run.kept
        if kept.source is None or kept.by_channels:
            return latents
        source = kept.source
        if run.index < len(run.timesteps) - 1:
            source = run.scheduler.add_noise(source, kept.noise, run.timesteps[run.index + 1 : run.index + 2])
        return (1 - kept.mask) * source + kept.mask * latents

    def finish(self, run: Run) -> Any:
        kept: Painting = run.kept
        output = run.pipe.decode_output(run, image=kept.image, mask=kept.pixel_mask)
        if kept.crop is not None:
            pictures = output.images if run.args.return_dict else output[0]
            overlay = run.pipe.image_processor.apply_overlay
            pictures[:] = [overlay(run.args.mask_image, run.args.image, p, kept.crop) for p in pictures]
        return output


class InstructEdit(ImageToImage):
    """Edit a picture by an instruction (InstructPix2Pix, arXiv:2211.09800): its latents are extra channels."""

    name = "instruct-edit"
    arguments = "image image_guidance_scale height width latents"
    callback_tensors = {"latents": LATENTS, "prompt_embeds": EMBEDS, "image_latents": CHANNELS}
    needs_image = "an instruction edits a picture; pass one"

    def check(self, run: Run) -> None:
        Task.check(self, run)

    def truncate(self, run: Run) -> None:
        """The schedule is whole: it starts from noise."""

    def prepare(self, run: Run) -> None:
        height, width = self.size(run)
        image = run.pipe.image_processor.preprocess(run.args.image, height=height, width=width)
        if image.shape[1] != run.pipe.latent_format.channels:
            image = run.pipe.latent_format.encode(image.to(run.device), mode=True) * run.pipe.reference_scale
        latents = per_picture(image.to(run.device, run.pipe.compute_dtype), run.batch, "image")
        blank = [torch.zeros_like(latents)] if run.guidance.branches == 3 else []
        run.channels = torch.cat([latents] * min(run.guidance.branches, 2) + blank)
        shape = (run.batch, run.pipe.latent_format.channels, *latents.shape[-2:])
        run.latents = self.noise_of_shape(run, shape) * run.scheduler.init_noise_sigma
