"""ControlNet for Stable Diffusion 3 and 3.5: the first blocks of the transformer, fed a picture (arXiv:2302.05543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import check_choice, check_shape
from ...outputs import BaseOutput
from ..layers.embeddings import PatchEmbedding
from ..layers.options import AttentionOptions, read_options
from ..several import Several
from ..transformers.sd3 import SD3Base, SD3Transformer2DModel
from .residuals import add_residuals, following, residual_layers, zeroed


@dataclass
class SD3ControlNetOutput(BaseOutput):
    """Residuals (B, N, C), one for each block of the ControlNet, for ``block_controlnet_hidden_states``."""

    controlnet_block_samples: list[torch.Tensor]


class SD3ControlNetModel(SD3Base):
    """The first blocks of the transformer, which read a picture and answer residuals.

    Args:
        sample_size, patch_size, in_channels, num_layers, attention_head_dim, num_attention_heads, caption_projection_dim,
            pooled_projection_dim, out_channels, pos_embed_max_size, dual_attention_layers, qk_norm: As
            :class:`SD3Transformer2DModel`'s; the last block carries its text on.
        joint_attention_dim: Width of the text tokens; ``None`` for a network that reads no text (Stable Diffusion 3.5 large),
            whose blocks have neither normalised queries nor dual attention.
        extra_conditioning_channels: Channels of the picture above those of the latents, such as a mask.
        pos_embed_type: ``"sincos"``, or ``None`` for patches without positions.
        use_pos_embed: ``False``: ``forward`` is given tokens that the transformer's ``pos_embed`` has made.
        force_zeros_for_pooled_projection: Pipelines pass zeros for the pooled text.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, sample_size: int = 128, patch_size: int = 2, in_channels: int = 16, num_layers: int = 18,
        attention_head_dim: int = 64, num_attention_heads: int = 18, joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152, pooled_projection_dim: int = 2048, out_channels: int = 16,
        pos_embed_max_size: int = 96, extra_conditioning_channels: int = 0, dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None, pos_embed_type: str | None = "sincos", use_pos_embed: bool = True,
        force_zeros_for_pooled_projection: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("pos_embed_type", pos_embed_type, (None, "sincos"))
        max_size = (0 if pos_embed_type is None else pos_embed_max_size) if use_pos_embed else None
        self._build(max_size, text=joint_attention_dim is not None, last_text_out=True)
        self.pos_embed_input = zeroed(PatchEmbedding(in_channels + extra_conditioning_channels, self.inner_dim, patch_size, 1, 0))
        self.controlnet_blocks = residual_layers(self.inner_dim, num_layers)

    @classmethod
    def from_transformer(
        cls, transformer: SD3Transformer2DModel, num_layers: int = 12, num_extra_conditioning_channels: int = 1,
        load_weights_from_transformer: bool = True,
    ) -> SD3ControlNetModel:  # fmt: skip
        """Builds a network to train, whose residuals are zero, for ``transformer``, in float32.

        Args:
            transformer: The transformer to steer.
            num_layers: Number of blocks, fewer than the transformer's; 0 for as many.
            num_extra_conditioning_channels: Channels of the picture above those of the latents.
            load_weights_from_transformer: Start from the transformer's weights.

        Raises:
            ConfigError: The transformer's weights do not fit.
        """
        own = {"num_layers": num_layers or transformer.config.num_layers}
        own["extra_conditioning_channels"] = num_extra_conditioning_channels
        return following(cls, transformer, load_weights_from_transformer, **own)

    def forward(
        self, hidden_states: torch.Tensor, controlnet_cond: torch.Tensor, conditioning_scale: float | torch.Tensor = 1.0,
        encoder_hidden_states: torch.Tensor | None = None, pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None, joint_attention_kwargs: AttentionOptions | None = None,
        return_dict: bool = True,
    ) -> SD3ControlNetOutput | tuple[list[torch.Tensor]]:  # fmt: skip
        """Answers residuals.

        Args:
            hidden_states: Noisy latents (B, in_channels, H, W); with ``use_pos_embed=False`` their tokens (B, N, C).
            controlnet_cond: The picture as latents (B, in_channels + extra_conditioning_channels, H, W).
            conditioning_scale: Weight of the residuals; a tensor can change without compiling again.
            encoder_hidden_states, pooled_projections, timestep, joint_attention_kwargs: As the transformer's.
            return_dict: Return :class:`SD3ControlNetOutput`, otherwise a tuple.

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        config, options = self.config, read_options("joint_attention_kwargs", joint_attention_kwargs)
        height, width = (side // config.patch_size for side in controlnet_cond.shape[2:])
        channels = self.pos_embed_input.proj.in_channels
        if self.pos_embed is None:
            note = "the transformer's pos_embed makes the tokens"
            check_shape("hidden_states", hidden_states, (None, height * width, self.inner_dim), note)
            check_shape("controlnet_cond", controlnet_cond, (len(hidden_states), channels, None, None))
            x = hidden_states
        else:
            check_shape("hidden_states", hidden_states, (None, config.in_channels, None, None))
            check_shape("controlnet_cond", controlnet_cond, (len(hidden_states), channels, *hidden_states.shape[2:]))
            x = self.pos_embed(hidden_states)
        text, joint = self._start(x, (height, width), encoder_hidden_states, pooled_projections, timestep, options)
        x, residuals = x + self.pos_embed_input(controlnet_cond), []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if not options.perturbs(block, "skip"):
                x, text = self.run_block(block, x, text, joint)
            residuals.append(out(x) * conditioning_scale)
        return SD3ControlNetOutput(residuals) if return_dict else (residuals,)


class SD3MultiControlNetModel(Several):
    """Several ControlNets, each with a picture of its own, whose residuals add up.

    Args:
        controlnets: The networks, as ``nets``.
    """

    member = SD3ControlNetModel

    def forward(
        self, hidden_states: torch.Tensor, controlnet_cond: Sequence[torch.Tensor],
        conditioning_scale: Sequence[float | torch.Tensor] | torch.Tensor, pooled_projections: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None, timestep: torch.Tensor | float | None = None,
        joint_attention_kwargs: AttentionOptions | None = None, return_dict: bool = True,
    ) -> SD3ControlNetOutput | tuple[list[torch.Tensor]]:  # fmt: skip
        """Answers the sum of the residuals, see :meth:`SD3ControlNetModel.forward`.

        Args:
            hidden_states, pooled_projections, encoder_hidden_states, timestep, joint_attention_kwargs, return_dict: Of all.
            controlnet_cond, conditioning_scale: A picture and a weight for each network.

        Raises:
            ValueError: There is another number of pictures or weights than of networks, or residuals do not add up.
        """
        self.check_counts(controlnet_cond=controlnet_cond, conditioning_scale=conditioning_scale)
        shared = (encoder_hidden_states, pooled_projections, timestep, joint_attention_kwargs, False)
        each = zip(self.members, controlnet_cond, conditioning_scale, strict=True)
        found = [network(hidden_states, picture, scale, *shared)[0] for network, picture, scale in each]
        residuals = add_residuals("controlnet_block_samples", found) or []
        return SD3ControlNetOutput(residuals) if return_dict else (residuals,)
