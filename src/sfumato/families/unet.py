"""What the families with a conditional U-Net share (arXiv:2112.10752)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..models.several import Several
from ..pipelines.adapters import Control
from ..pipelines.checks import check_number
from ..pipelines.conditioning import Conditioning, numbered
from ..pipelines.guidance import WHOLE, EditGuidance, Guidance, Weakening
from ..pipelines.image import ATTENTION_INPUTS, attention_options, network_of, region_options
from ..pipelines.ip_adapter import PicturePrompts
from ..pipelines.run import Run

ADDED = ("text_embeds", "time_ids", "image_embeds")
"""Conditioning that reaches the U-Net as ``added_cond_kwargs``."""

CONTROL_INPUTS = ("encoder_hidden_states", "added_cond_kwargs")
"""What a control network shares with the U-Net that it follows."""

RESIDUALS = ("down_block_additional_residuals", "down_intrablock_additional_residuals")
"""Conditioning of several tensors that reaches the U-Net as a tuple."""


class UNetFamily(PicturePrompts):
    """A conditional U-Net that predicts latents."""

    adapters_before = "scheduler"
    reference_scale = 1.0  # of the latents of a picture to edit
    _freeu: tuple[float, float, float, float] | None = None

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Strengthens the U-Net's features against its skip connections in calls from now on (FreeU, arXiv:2309.11497).

        Args:
            s1, s2: Factors of the skip connections' lowest frequencies in the first and second stage of the way up, below 1.
            b1, b2: Factors of the features there, above 1.

        Raises:
            ValueError: A factor is no finite number, or the U-Net has no blocks of the kind.
        """
        for name, value in {"s1": s1, "s2": s2, "b1": b1, "b2": b2}.items():
            check_number(name, value)
        if not any(getattr(block, "can_be_freed", False) for block in self.unet.up_blocks[:2]):
            raise ValueError(f"FreeU acts on up blocks of convolutions, and this U-Net has {self.unet.config.up_block_types}")
        self._freeu = (s1, b1, s2, b2)

    def disable_freeu(self) -> None:
        """Undoes :meth:`enable_freeu`."""
        self._freeu = None

    @torch.no_grad()
    def start(self, *args: Any, **kwargs: Any) -> Run:
        run = super().start(*args, **kwargs)
        if self._freeu is not None:
            factors = torch.tensor(self._freeu, device=run.device).view(1, 2, 2)
            run.conditioning = run.conditioning.replace(freeu=factors.expand(run.batch * run.guidance.branches, -1, -1))
        return run

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        return network_of(self, weakening)(x, t, **unet_inputs(conditioning, weakening), return_dict=False)[0]

    def control(
        self, run: Run, control: Control, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The residuals of a control network; in guess mode for the prompt's branch alone, zeros for the others."""
        count, batch, last = len(branches), run.batch, run.guidance.layout.index("positive")
        alone = control.guess and count > 1 and last in branches
        if alone:
            at = branches.index(last)
            x, t, conditioning = x[at * batch :][:batch], t[at * batch :][:batch], conditioning.branches([at], count, batch)
        rows = 1 if alone else count
        inputs = {k: v for k, v in unet_inputs(conditioning).items() if k in CONTROL_INPUTS}
        inputs["cross_attention_kwargs"] = region_options(conditioning)
        pictures: Any = [torch.cat([picture] * rows) for picture in control.pictures]
        if control.kinds is None:
            pictures = pictures[0]
        else:
            kinds = torch.zeros(1, control.network.config.num_control_type, device=x.device, dtype=x.dtype)
            kinds[0, control.kinds] = 1
            inputs |= {"control_type": kinds.expand(len(x), -1), "control_type_idx": control.kinds}
            inputs["from_multi"] = isinstance(self.controlnet, Several)
        options = {"conditioning_scale": control.scale, "guess_mode": control.guess}
        out = control.network(x, t, controlnet_cond=pictures, **inputs, **options)
        found = {**numbered(RESIDUALS[0], out.down_block_res_samples), "mid_block_additional_residual": out.mid_block_res_sample}
        if not alone:
            return found
        blank = [torch.zeros_like, lambda value: value]
        return {k: torch.cat([blank[branch == last](v) for branch in branches]) for k, v in found.items()}

    def choose_guidance(self, run: Run) -> Guidance:
        if self.unet.config.time_cond_proj_dim is None:
            return super().choose_guidance(run)
        return self.given_guidance(run) or Guidance()  # a distilled denoiser guides itself, by the scale that it reads

    def guidance_condition(self, run: Run) -> dict[str, torch.Tensor]:
        """The embedded guidance scale (B, D) that distilled denoisers read."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        weights = torch.full((run.batch,), run.args.guidance_scale - 1.0, device=run.device)
        return {"timestep_cond": guidance_embedding(weights, width).to(self.compute_dtype)}


class Editing(UNetFamily):
    """A denoiser that edits a picture as an instruction says (arXiv:2211.09800)."""

    def choose_guidance(self, run: Run) -> Guidance:
        args = run.args
        if args.guidance is not None:
            raise ValueError("guidance=...: a denoiser that edits by instruction has a guidance of its own; leave it out")
        guided = args.guidance_scale > 1.0 and args.image_guidance_scale >= 1.0
        return EditGuidance(args.guidance_scale, args.image_guidance_scale, args.guidance_rescale) if guided else Guidance()


def unet_inputs(conditioning: Conditioning, weakening: Weakening = WHOLE) -> dict[str, Any]:
    """Sorts conditioning into the keywords of the U-Net, or of a network that follows one."""
    inputs: dict[str, Any] = {"cross_attention_kwargs": attention_options(conditioning, weakening)}
    added: dict[str, Any] = {}
    for key, value in conditioning.items():
        name = key.partition(".")[0]
        if name in ADDED:
            added[key] = value
        elif name in RESIDUALS:
            inputs[name] = (*inputs.get(name, ()), value)
        elif name not in ATTENTION_INPUTS:
            inputs[key] = value
    return {**inputs, "added_cond_kwargs": added} if added else inputs


def guidance_embedding(weights: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000 times the guidance weights (arXiv:2310.04378, appendix), ``(B,)`` -> ``(B, width)``."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=weights.device) * -(math.log(10000.0) / (half - 1)))
    angles = weights[:, None] * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
