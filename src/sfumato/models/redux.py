"""FLUX.1 Redux (Black Forest Labs, 2024): a picture as tokens that a transformer reads like text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import check_shape
from ..outputs import BaseOutput
from .base import ModelMixin


@dataclass
class ReduxImageEncoderOutput(BaseOutput):
    """Tokens of a picture: ``image_embeds`` (B, N, txt_in_features)."""

    image_embeds: torch.Tensor


class ReduxImageEncoder(ModelMixin):
    """Two linear layers from a picture encoder's (SigLIP's) features to tokens among the text's.

    Args:
        redux_dim: Width of the features.
        txt_in_features: Width of the text tokens.
    """

    def __init__(self, redux_dim: int = 1152, txt_in_features: int = 4096) -> None:
        super().__init__()
        self.redux_up = nn.Linear(redux_dim, txt_in_features * 3)
        self.redux_down = nn.Linear(txt_in_features * 3, txt_in_features)

    def forward(self, x: torch.Tensor) -> ReduxImageEncoderOutput:
        """Features (B, N, redux_dim) -> tokens (B, N, txt_in_features); a ``ValueError`` for another width."""
        check_shape("x", x, (None, None, self.config.redux_dim), "pass the last hidden state of the picture encoder")
        return ReduxImageEncoderOutput(self.redux_down(F.silu(self.redux_up(x))))
