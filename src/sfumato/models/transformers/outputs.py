"""What transformers answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...outputs import BaseOutput


@dataclass
class Transformer2DModelOutput(BaseOutput):
    """Output of a transformer: ``sample``, (B, C, H, W), or tokens (B, N, C) where the network works on those."""

    sample: torch.Tensor
