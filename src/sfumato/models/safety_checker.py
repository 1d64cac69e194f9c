"""The safety checker of Stable Diffusion: CLIP similarity of a picture to fixed concepts (arXiv:2210.04610 describes it)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel

CONCEPTS, SPECIAL_CONCEPTS = 17, 3
ADJUSTMENT = 0.01


class StableDiffusionSafetyChecker(PreTrainedModel):
    """Blackens pictures whose CLIP embedding comes too near to a concept.

    Args:
        config: Configuration of the CLIP model whose vision half is used.
    """

    config_class = CLIPConfig
    main_input_name = "clip_input"
    base_model_prefix = "safety_checker"
    concept_embeds: nn.Parameter
    concept_embeds_weights: nn.Parameter
    special_care_embeds: nn.Parameter
    special_care_embeds_weights: nn.Parameter

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        width: Any = config.projection_dim
        vision: Any = config.vision_config
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, width, bias=False)
        for name, count in (("concept", CONCEPTS), ("special_care", SPECIAL_CONCEPTS)):
            self.register_parameter(f"{name}_embeds", nn.Parameter(torch.ones(count, width), requires_grad=False))
            self.register_parameter(f"{name}_embeds_weights", nn.Parameter(torch.ones(count), requires_grad=False))
        self.post_init()

    @torch.no_grad()
    def forward(self, clip_input: torch.Tensor, images: torch.Tensor) -> tuple[Any, list[bool]]:
        """Judges pictures.

        Args:
            clip_input: The pictures as CLIP takes them (B, 3, 224, 224).
            images: The pictures to return (B, 3, H, W).

        Returns:
            The pictures, black where they were judged unsafe, and the verdicts.
        """
        embeds = F.normalize(self.visual_projection(self.vision_model(clip_input).pooler_output))
        special = embeds @ F.normalize(self.special_care_embeds).T - self.special_care_embeds_weights  # (B, 3)
        care = (special.round(decimals=3) > 0).any(dim=1, keepdim=True)
        concept = embeds @ F.normalize(self.concept_embeds).T - self.concept_embeds_weights + care * ADJUSTMENT  # (B, 17)
        flags = (concept.round(decimals=3) > 0).any(dim=1)
        images = torch.where(flags.view(-1, *[1] * (images.ndim - 1)), torch.zeros_like(images), images)
        return images, flags.tolist()
