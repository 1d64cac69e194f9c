"""The denoiser of FLUX.1 (Black Forest Labs, 2024): joint blocks, then blocks on one sequence, with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ...errors import ConfigError, check_shape
from ..base import ModelMixin
from ..layers.compute import GELULinear, Linear
from ..layers.embeddings import TimeTextEmbedding, time_tensor
from ..layers.joint_attention import Joint, JointAttention, JointBlock, regions_within
from ..layers.modulation import Modulation, add_gated, modulated, within_float16
from ..layers.options import AttentionOptions, read_options
from ..layers.rope import rope_table
from .outputs import Transformer2DModelOutput
from .sd3 import check_residuals


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on one sequence of text and image tokens (arXiv:2302.05442, section 2)."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.proj_mlp = GELULinear(dim, 4 * dim)
        self.proj_out = Linear(5 * dim, dim)
        self.attn = JointAttention(dim, heads, dim_head, qk_norm=True, text=False, out=False)

    def forward(self, x: torch.Tensor, joint: Joint) -> torch.Tensor:
        """``(B, M + N, C)`` -> the same."""
        shift, scale, gate = self.norm(joint.condition)
        return within_float16(add_gated(x, gate, self.proj_out(self._side_by_side(modulated(x, shift, scale), joint))))

    def _side_by_side(self, x: torch.Tensor, joint: Joint) -> torch.Tensor:
        """``(B, M + N, C)`` -> ``(B, M + N, 5 * C)``; by itself so that its parts are free when the largest layer runs."""
        return torch.cat([self.attn(x, None, joint)[0], self.proj_mlp(x)], dim=2)


class FluxBase(ModelMixin):
    """What the denoiser and its ControlNet share; built from the configuration, by its key names."""

    def _build(self) -> None:
        config = self.config
        heads, dim_head = config.num_attention_heads, config.attention_head_dim
        dim = self.inner_dim = heads * dim_head
        axes = config.axes_dims_rope
        if sum(axes) != dim_head or any(axis % 2 for axis in axes):
            raise ConfigError(f"axes_dims_rope={axes!r}: expected even numbers that add up to attention_head_dim={dim_head}")
        self.time_text_embed = TimeTextEmbedding(dim, config.pooled_projection_dim, config.guidance_embeds)
        self.context_embedder = Linear(config.joint_attention_dim, dim)
        self.x_embedder = Linear(config.in_channels, dim)
        blocks = (JointBlock(dim, heads, dim_head, qk_norm=True) for _ in range(config.num_layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(dim, heads, dim_head) for _ in range(config.num_single_layers))

    def _start(
        self, x: torch.Tensor, text: torch.Tensor | None, pooled: torch.Tensor | None, timestep: torch.Tensor | float | None,
        guidance: torch.Tensor | None, img_ids: torch.Tensor | None, txt_ids: torch.Tensor | None, options: AttentionOptions,
        prefix: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Joint]:  # fmt: skip
        """Arguments of ``forward``, checked -> text tokens (B, M, C), and what the blocks share.

        ``prefix`` (B, 1, C) is set before the text tokens, at the place of their first.
        """
        config, batch = self.config, len(x)
        check_shape("hidden_states", x, (None, None, config.in_channels), "pack the latents into tokens")
        check_shape("encoder_hidden_states", text, (batch, None, config.joint_attention_dim))
        check_shape("pooled_projections", pooled, (batch, config.pooled_projection_dim))
        assert text is not None and pooled is not None
        ids = []
        for name, given, tokens in (("txt_ids", txt_ids, text), ("img_ids", img_ids, x)):
            places = given[0] if given is not None and given.dim() == 3 else given  # one for all samples, as early callers pass
            check_shape(name, places, (tokens.shape[1], len(config.axes_dims_rope)), "one place for each token")
            assert places is not None
            ids.append(places)
        if timestep is None:
            raise ValueError("timestep is missing: pass one time in 0..1, or one per sample")
        if config.guidance_embeds != (guidance is not None):
            wrong = "missing: pass a scale, such as 3.5, for each sample" if guidance is None else "given: pass None"
            raise ValueError(f"this network has guidance_embeds={config.guidance_embeds}, and guidance is {wrong}")
        times = time_tensor(timestep, x).to(x.dtype) * 1000
        scales = None if guidance is None else time_tensor(guidance, x).to(x.dtype) * 1000
        condition = nn.functional.silu(self.time_text_embed(times, pooled, scales))
        size = (options.size or _grid_size(ids[1])) if _needs_size(options) else None
        mask = regions_within(options, size, text.shape[1], x.shape[1], before=0 if prefix is None else 1)
        tokens = self.context_embedder(text)
        if prefix is not None:
            tokens, ids = torch.cat([prefix, tokens], dim=1), [ids[0][:1], *ids]
        rope = rope_table(torch.cat(ids, dim=0), config.axes_dims_rope)
        return tokens, Joint(condition, x.shape[1], size, rope, mask, options)


def _needs_size(options: AttentionOptions) -> bool:
    blurs = options.perturbation is not None and options.perturbation.kind == "blur"
    return blurs or options.regions is not None or bool(options.image_masks)


def _grid_size(ids: torch.Tensor) -> tuple[int, int]:
    """Height and width in tokens of the picture that is made, from the places (N, 3): those that are 0 on the first axis."""
    own = ids[ids[:, 0] == 0]
    height, width = (int(side) + 1 for side in own[:, 1:].amax(dim=0))
    if height * width != len(own):
        raise ValueError(f"img_ids holds {len(own)} places of a {height} x {width} grid: regions and blur need whole pictures")
    return height, width


class FluxTransformer2DModel(FluxBase):
    """A transformer over packed latents and text tokens: joint blocks, then single ones.

    Args:
        patch_size: Side of the patches that the prediction is made of; latents are packed before, so 1.
        in_channels, out_channels: Channels of the tokens given and, by default the same, of the prediction. Fill (384) and
            Canny/Depth (128) have channels of a mask and pictures besides the 64 that are predicted.
        num_layers, num_single_layers: Number of joint blocks, and of single ones.
        attention_head_dim, num_attention_heads: Width of a head, and their number; their product is the width of the tokens.
        joint_attention_dim, pooled_projection_dim: Width of the text tokens, and of the pooled text.
        guidance_embeds: The network is distilled for guidance and reads its scale (dev); schnell does not.
        axes_dims_rope: Channels of a head that turn with each axis of a token's place.

    Raises:
        ConfigError: Values do not fit together.
    """

    def __init__(
        self, patch_size: int = 1, in_channels: int = 64, out_channels: int | None = None, num_layers: int = 19,
        num_single_layers: int = 38, attention_head_dim: int = 128, num_attention_heads: int = 24,
        joint_attention_dim: int = 4096, pooled_projection_dim: int = 768, guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
    ) -> None:  # fmt: skip
        super().__init__()
        self._build()
        self.encoder_hid_proj: nn.Module | None = None  # of picture prompts, while an IP-Adapter is loaded
        self.norm_out = Modulation(self.inner_dim, 2)
        self.proj_out = Linear(self.inner_dim, patch_size * patch_size * (out_channels or in_channels))

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None, timestep: torch.Tensor | float | None = None,
        img_ids: torch.Tensor | None = None, txt_ids: torch.Tensor | None = None, guidance: torch.Tensor | None = None,
        joint_attention_kwargs: AttentionOptions | None = None,
        controlnet_block_samples: Sequence[torch.Tensor] | None = None,
        controlnet_single_block_samples: Sequence[torch.Tensor] | None = None, return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:  # fmt: skip
        """Predicts.

        Args:
            hidden_states: Noisy latents, packed 2 x 2, (B, N, in_channels).
            encoder_hidden_states: Text tokens (B, M, joint_attention_dim).
            pooled_projections: Pooled text (B, pooled_projection_dim).
            timestep: One time in 0..1, or (B,) of them.
            img_ids, txt_ids: Places of the tokens (N, 3) and (M, 3): which picture, row, column; zeros for text.
            guidance: Guidance scales (B,), where the network was built with ``guidance_embeds``.
            joint_attention_kwargs: :class:`~sfumato.models.layers.options.AttentionOptions`, or nothing.
            controlnet_block_samples, controlnet_single_block_samples: Residuals (B, N, C), each added after
                ``ceil(blocks / count)`` neighbouring blocks.
            return_dict: Return :class:`Transformer2DModelOutput`, otherwise a tuple.
            controlnet_blocks_repeat: Deal the residuals of the joint blocks out in turns instead.

        Returns:
            The prediction (B, N, out_channels).

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options = read_options("joint_attention_kwargs", joint_attention_kwargs)
        text, joint = self._start(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance, img_ids, txt_ids, options
        )
        x = self.x_embedder(hidden_states)
        residuals, single_residuals = controlnet_block_samples or (), controlnet_single_block_samples or ()
        check_residuals("controlnet_block_samples", residuals, len(self.transformer_blocks), x)
        check_residuals("controlnet_single_block_samples", single_residuals, len(self.single_transformer_blocks), x)
        run = math.ceil(len(self.transformer_blocks) / (len(residuals) or 1))
        for i, block in enumerate(self.transformer_blocks):
            if not options.perturbs(block, "skip"):
                x, text = self.run_block(block, x, text, joint)
            if residuals:
                x = x + residuals[i % len(residuals) if controlnet_blocks_repeat else i // run]
        tokens, run = text.shape[1], math.ceil(len(self.single_transformer_blocks) / (len(single_residuals) or 1))
        x = torch.cat([text, x], dim=1)
        for i, block in enumerate(self.single_transformer_blocks):
            if not options.perturbs(block, "skip"):
                x = self.run_block(block, x, joint)
            if single_residuals:
                x = torch.cat([x[:, :tokens], x[:, tokens:] + single_residuals[i // run]], dim=1)
        scale, shift = self.norm_out(joint.condition)
        x = self.proj_out(modulated(x[:, tokens:], shift, scale))
        return Transformer2DModelOutput(x) if return_dict else (x,)
