"""ControlNet for FLUX.1: the first joint and single blocks of the transformer, fed a picture (arXiv:2302.05543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import ConfigError, check_shape
from ...outputs import BaseOutput
from ..layers.options import AttentionOptions, read_options
from ..several import Several
from ..transformers.flux import FluxBase, FluxTransformer2DModel
from .controlnet import ControlNetConditioningEmbedding
from .residuals import add_residuals, following, residual_layers, zeroed

_Residuals = list[torch.Tensor] | None


@dataclass
class FluxControlNetOutput(BaseOutput):
    """Residuals (B, N, C), one for each joint and each single block of the ControlNet; ``None`` where it has no such block."""

    controlnet_block_samples: list[torch.Tensor] | None
    controlnet_single_block_samples: list[torch.Tensor] | None


class FluxControlNetModel(FluxBase):
    """The first blocks of the transformer, which read a picture and answer residuals.

    Args:
        patch_size: Side of the patches that features of a picture are packed into, with ``conditioning_embedding_channels``.
        in_channels, num_layers, num_single_layers, attention_head_dim, num_attention_heads, joint_attention_dim,
            pooled_projection_dim, guidance_embeds, axes_dims_rope: As :class:`FluxTransformer2DModel`'s.
        num_mode: Number of kinds of pictures that a union network tells apart, ``None`` for one that is no union.
        conditioning_embedding_channels: Channels of the features that convolutions make of a picture, an eighth of its size;
            ``None``: the picture is given as packed latents.

    Raises:
        ConfigError: Values do not fit together.
    """

    def __init__(
        self, patch_size: int = 1, in_channels: int = 64, num_layers: int = 19, num_single_layers: int = 38,
        attention_head_dim: int = 128, num_attention_heads: int = 24, joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768, guidance_embeds: bool = False, axes_dims_rope: Sequence[int] = (16, 56, 56),
        num_mode: int | None = None, conditioning_embedding_channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build()
        self.controlnet_blocks = residual_layers(self.inner_dim, num_layers)
        self.controlnet_single_blocks = residual_layers(self.inner_dim, num_single_layers)
        self.controlnet_mode_embedder = None if num_mode is None else nn.Embedding(num_mode, self.inner_dim)
        self.input_hint_block: ControlNetConditioningEmbedding | None = None
        if conditioning_embedding_channels is not None:
            if conditioning_embedding_channels * patch_size**2 != in_channels:
                raise ConfigError(
                    f"conditioning_embedding_channels={conditioning_embedding_channels} in patches of patch_size={patch_size} "
                    f"do not make in_channels={in_channels} channels"
                )
            self.input_hint_block = ControlNetConditioningEmbedding(conditioning_embedding_channels, widths=(16, 16, 16, 16))
        self.controlnet_x_embedder = zeroed(nn.Linear(in_channels, self.inner_dim))

    @property
    def union(self) -> bool:
        """Whether the network reads pictures of several kinds, told by ``controlnet_mode``."""
        return self.controlnet_mode_embedder is not None

    @classmethod
    def from_transformer(
        cls, transformer: FluxTransformer2DModel, num_layers: int = 4, num_single_layers: int = 10,
        attention_head_dim: int = 128, num_attention_heads: int = 24, load_weights_from_transformer: bool = True,
    ) -> FluxControlNetModel:  # fmt: skip
        """Builds a network to train, whose residuals are zero, for ``transformer``, in float32.

        Args:
            transformer: The transformer to steer.
            num_layers, num_single_layers: Number of joint and of single blocks, at most the transformer's.
            attention_head_dim, num_attention_heads: The transformer's.
            load_weights_from_transformer: Start from the transformer's weights.

        Raises:
            ConfigError: The transformer's weights do not fit.
        """
        own = {"num_layers": num_layers, "num_single_layers": num_single_layers}
        own |= {"attention_head_dim": attention_head_dim, "num_attention_heads": num_attention_heads}
        return following(cls, transformer, load_weights_from_transformer, **own)

    def forward(
        self, hidden_states: torch.Tensor, controlnet_cond: torch.Tensor, controlnet_mode: torch.Tensor | None = None,
        conditioning_scale: float | torch.Tensor = 1.0, encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None, timestep: torch.Tensor | float | None = None,
        img_ids: torch.Tensor | None = None, txt_ids: torch.Tensor | None = None, guidance: torch.Tensor | None = None,
        joint_attention_kwargs: AttentionOptions | None = None, return_dict: bool = True,
    ) -> FluxControlNetOutput | tuple[_Residuals, _Residuals]:  # fmt: skip
        """Answers residuals.

        Args:
            hidden_states: Noisy latents, packed, (B, N, in_channels).
            controlnet_cond: The picture as packed latents (B, N, in_channels); with ``conditioning_embedding_channels`` itself,
                (B, 3, H, W) in -1..1.
            controlnet_mode: Kind of the picture (B, 1), for a union network.
            conditioning_scale: Weight of the residuals; a tensor can change without compiling again.
            encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, joint_attention_kwargs: As the
                transformer's.
            return_dict: Return :class:`FluxControlNetOutput`, otherwise a tuple.

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options, mode = read_options("joint_attention_kwargs", joint_attention_kwargs), None
        if self.controlnet_mode_embedder is not None:
            note = "pass the kind of the picture, a number for each sample"
            check_shape("controlnet_mode", controlnet_mode, (len(hidden_states), 1), note)
            mode = self.controlnet_mode_embedder(controlnet_mode)
        elif controlnet_mode is not None:
            raise ValueError("controlnet_mode is given, but this network (num_mode=None) is no union: pass None")
        text, joint = self._start(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance, img_ids, txt_ids, options, mode
        )
        x = self.x_embedder(hidden_states) + self.controlnet_x_embedder(self._packed(controlnet_cond, hidden_states))
        residuals, single_residuals = [], []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if not options.perturbs(block, "skip"):
                x, text = self.run_block(block, x, text, joint)
            residuals.append(out(x) * conditioning_scale)
        tokens, x = text.shape[1], torch.cat([text, x], dim=1)
        for block, out in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            if not options.perturbs(block, "skip"):
                x = self.run_block(block, x, joint)
            single_residuals.append(out(x[:, tokens:]) * conditioning_scale)
        found = (residuals or None, single_residuals or None)
        return FluxControlNetOutput(*found) if return_dict else found

    def _packed(self, picture: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The picture as tokens (B, N, in_channels), as many as ``tokens``."""
        if self.input_hint_block is None:
            check_shape("controlnet_cond", picture, tuple(tokens.shape), "encode the picture and pack it as the latents")
            return picture
        check_shape("controlnet_cond", picture, (len(tokens), 3, None, None))
        patch, features = self.config.patch_size, self.input_hint_block(picture)
        size = [side // patch for side in features.shape[2:]]
        if size[0] * size[1] != tokens.shape[1] or any(side % (8 * patch) for side in picture.shape[2:]):
            raise ValueError(
                f"controlnet_cond of {tuple(picture.shape[2:])} pixels makes {size[0]} x {size[1]} tokens, not the "
                f"{tokens.shape[1]} of hidden_states: resize the picture to {8 * patch} times the tokens"
            )
        # (B, C, h * p, w * p) -> (B, h * w, C * p * p)
        return nn.functional.pixel_unshuffle(features, patch).flatten(2).transpose(1, 2)


class FluxMultiControlNetModel(Several):
    """Several ControlNets, each with a picture of its own, whose residuals add up; or one union network for several pictures.

    Args:
        controlnets: The networks, as ``nets``.
    """

    member = FluxControlNetModel

    def forward(
        self, hidden_states: torch.Tensor, controlnet_cond: Sequence[torch.Tensor],
        controlnet_mode: Sequence[torch.Tensor | None], conditioning_scale: Sequence[float | torch.Tensor] | torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None, pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None, img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None, guidance: torch.Tensor | None = None,
        joint_attention_kwargs: AttentionOptions | None = None, return_dict: bool = True,
    ) -> FluxControlNetOutput | tuple[_Residuals, _Residuals]:  # fmt: skip
        """Answers the sum of the residuals, see :meth:`FluxControlNetModel.forward`.

        Args:
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                joint_attention_kwargs, return_dict: Of all.
            controlnet_cond, controlnet_mode, conditioning_scale: A picture, its kind (B,) (``None`` for a network that is no
                union) and a weight for each network; for a single network any number of them.

        Raises:
            ValueError: There is another number of pictures, kinds or weights than of networks, or residuals do not add up.
        """
        networks = self.members
        if len(networks) == 1:
            networks = networks * len(controlnet_cond)
        else:
            self.check_counts(
                controlnet_cond=controlnet_cond, controlnet_mode=controlnet_mode, conditioning_scale=conditioning_scale
            )
        shared = (encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, joint_attention_kwargs, False)
        modes = [None if mode is None else mode[:, None] for mode in controlnet_mode]
        each = zip(networks, controlnet_cond, modes, conditioning_scale, strict=True)
        found = [network(hidden_states, picture, mode, scale, *shared) for network, picture, mode, scale in each]
        sums = (
            add_residuals("controlnet_block_samples", [joint for joint, _ in found]),
            add_residuals("controlnet_single_block_samples", [single for _, single in found]),
        )
        return FluxControlNetOutput(*sums) if return_dict else sums
