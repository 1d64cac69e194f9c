"""What the families of rectified-flow transformers share: schedules that depend on the size of a picture (arXiv:2403.03206)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..pipelines.checks import check_pooled, check_prompts, check_width
from ..pipelines.ip_adapter import PicturePrompts
from ..pipelines.run import Run, accepted


class FlowFamily(PicturePrompts):
    """A transformer that predicts the velocity of latents."""

    denoiser_name = "transformer"
    adapters_before = "image_encoder"
    picture_sets_size = False
    rounds_skipped_steps = True
    takes_ip_adapters = False
    attention_keywords = "joint_attention_kwargs"
    first_sigmas = False  # whether levels are spread evenly from 1 to 1 / steps, before any shift

    @property
    def size_multiple(self) -> int:
        return self.latent_format.factor * 2  # latents are taken in patches of 2 x 2

    def check(self, run: Run) -> None:
        super().check(run)
        check_prompts(run.args)
        check_pooled(run.args)
        config = self.transformer.config
        check_width(run.args, ("prompt_embeds", "negative_prompt_embeds"), config.joint_attention_dim)
        check_width(run.args, ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), config.pooled_projection_dim)

    def schedule_options(self, run: Run, given: dict[str, Any]) -> dict[str, Any]:
        takes = accepted(type(run.scheduler).set_timesteps)
        steps = given.get("num_inference_steps")
        if self.first_sigmas and steps is not None and "sigmas" in takes:
            given = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()}
        if "mu" in takes and run.scheduler.config.get("use_dynamic_shifting"):
            given = {**given, "mu": run.args.mu if run.args.mu is not None else self.shift_of_size(run)}
        return given

    def shift_of_size(self, run: Run) -> float:
        """How far to shift the schedule towards noise: linear in the number of tokens (section 5.3.2)."""
        height, width = self.task.size(run)
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        config = run.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return least + (most - least) * (tokens - low) / (high - low)
