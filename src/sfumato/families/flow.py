"""What the families of rectified-flow transformers share: schedules that depend on the size of a picture (arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..pipelines.checks import check_pooled, check_prompts, check_width
from ..pipelines.ip_adapter import PicturePrompts, checked_scale, projections_of
from ..pipelines.run import Run, accepted


class FlowFamily(PicturePrompts):
    """A transformer that predicts the velocity of latents."""

    denoiser_name = "transformer"
    adapters_before = "image_encoder"
    picture_sets_size = False
    rounds_skipped_steps = True
    attention_keywords = "joint_attention_kwargs"
    first_sigmas = False  # whether levels are spread evenly from 1 to 1 / steps, before any shift
    schedulers_sigmas = False  # whether schedulers with `use_flow_sigmas` lay out their own levels

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
        own = self.schedulers_sigmas and run.scheduler.config.get("use_flow_sigmas")
        if self.first_sigmas and steps is not None and "sigmas" in takes and not own:
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

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Sets how strongly the IP-Adapters act, in calls that start from now on.

        Args:
            scale: A number. For one IP-Adapter a list with one for each joint block; for several a list with a number, or such a
                list, for each.

        Raises:
            ValueError: No IP-Adapter is loaded, or the scales do not fit the network.
        """
        adapters = projections_of(self.denoiser)
        one = adapters is not None and len(adapters.scales) == 1
        by_block = isinstance(scale, (list, tuple)) and not any(isinstance(each, (list, tuple)) for each in scale)
        super().set_ip_adapter_scale([scale] if one and by_block else scale)

    def scales_of_layers(self, scale: Any, names: Sequence[str]) -> tuple[Any, ...]:
        blocks = [int(name.split(".")[1]) for name in names]  # transformer_blocks.0.attn2
        count = len(set(blocks))
        values = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
        if len(values) != count:
            raise ValueError(f"scale has {len(values)} values for {count} joint blocks: pass a number, or one for each block")
        return tuple(checked_scale(values[block]) for block in blocks)
