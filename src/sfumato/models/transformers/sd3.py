"""The denoiser of Stable Diffusion 3 and 3.5: MMDiT (arXiv:2403.03206, section 4) on patches of latents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from ...errors import ConfigError, check_choice, check_shape
from ..base import ModelMixin
from ..layers.compute import Linear
from ..layers.embeddings import PatchEmbedding, TimeTextEmbedding, time_tensor
from ..layers.joint_attention import Joint, JointBlock, regions_within
from ..layers.modulation import Modulation, modulated
from ..layers.options import AttentionOptions, read_options
from .outputs import Transformer2DModelOutput


class SD3Base(ModelMixin):
    """What the denoiser and its ControlNet share; built from the configuration, by its key names."""

    pos_embed: PatchEmbedding | None
    context_embedder: nn.Module | None

    def _build(self, max_size: int | None, text: bool, last_text_out: bool) -> None:
        """Builds embeddings and blocks.

        ``max_size`` is the side of the grid of positions, 0 for patches without positions, ``None`` for tokens that are made
        elsewhere. ``text``: with text tokens; ``last_text_out``: also out of the last block.
        """
        config = self.config
        heads, dim_head = config.num_attention_heads, config.attention_head_dim
        dim = self.inner_dim = heads * dim_head
        check_choice("qk_norm", config.qk_norm, (None, "rms_norm"))
        if text and config.caption_projection_dim != dim:
            raise ConfigError(
                f"caption_projection_dim={config.caption_projection_dim} must be num_attention_heads * attention_head_dim = {dim}"
            )
        if surplus := [i for i in config.dual_attention_layers if i not in range(config.num_layers)]:
            raise ConfigError(f"dual_attention_layers names layer {surplus[0]} of num_layers={config.num_layers}: leave it out")
        self.pos_embed = None
        if max_size is not None:
            base_size = config.sample_size // config.patch_size
            self.pos_embed = PatchEmbedding(config.in_channels, dim, config.patch_size, base_size, max_size)
        self.time_text_embed = TimeTextEmbedding(dim, config.pooled_projection_dim)
        self.context_embedder = Linear(config.joint_attention_dim, dim) if text else None
        self.transformer_blocks = nn.ModuleList()
        for i in range(config.num_layers):
            # without text, the format has blocks of the plainest kind
            qk_norm, dual = text and config.qk_norm is not None, text and i in config.dual_attention_layers
            text_out = last_text_out or i < config.num_layers - 1
            block = JointBlock(dim, heads, dim_head, qk_norm=qk_norm, text=text, text_out=text_out, dual=dual)
            self.transformer_blocks.append(block)

    def _start(
        self, x: torch.Tensor, size: tuple[int, int], text: torch.Tensor | None, pooled: torch.Tensor | None,
        timestep: torch.Tensor | float | None, options: AttentionOptions,
    ) -> tuple[torch.Tensor | None, Joint]:  # fmt: skip
        """Image tokens (B, N, C), of a picture of ``size`` in tokens -> text tokens (B, M, C), and what the blocks share."""
        config = self.config
        check_shape("pooled_projections", pooled, (len(x), config.pooled_projection_dim))
        assert pooled is not None
        if timestep is None:
            raise ValueError("timestep is missing: pass one time in 0..1000, or one per sample")
        condition = nn.functional.silu(self.time_text_embed(time_tensor(timestep, x), pooled))
        tokens, mask = None, None
        if self.context_embedder is not None:
            check_shape("encoder_hidden_states", text, (len(x), None, config.joint_attention_dim))
            tokens = self.context_embedder(text)
            mask = regions_within(options, size, tokens.shape[1], x.shape[1])
        elif text is not None:
            raise ValueError("encoder_hidden_states is given, but this network (joint_attention_dim=None) reads no text: pass None")
        return tokens, Joint(condition, x.shape[1], size, mask=mask, options=options)


class SD3Transformer2DModel(SD3Base):
    """A transformer over patches of latents and text tokens together.

    Args:
        sample_size, patch_size: Height and width of the latents in training; side of a patch.
        in_channels, out_channels: Channels of the latents and of the prediction.
        num_layers: Number of blocks.
        attention_head_dim, num_attention_heads: Width of a head, and their number; their product is the width of the tokens.
        joint_attention_dim, caption_projection_dim: Width of the text tokens given, and of those in the blocks (the width above).
        pooled_projection_dim: Width of the pooled text.
        pos_embed_max_size: Side of the grid of positions, in patches; the middle of it is used.
        dual_attention_layers: Blocks with a second attention among image tokens (Stable Diffusion 3.5 medium).
        qk_norm: ``"rms_norm"`` normalises queries and keys (3.5), ``None`` does not.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, sample_size: int = 128, patch_size: int = 2, in_channels: int = 16, num_layers: int = 18,
        attention_head_dim: int = 64, num_attention_heads: int = 18, joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152, pooled_projection_dim: int = 2048, out_channels: int = 16,
        pos_embed_max_size: int = 96, dual_attention_layers: tuple[int, ...] = (), qk_norm: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(pos_embed_max_size, text=True, last_text_out=False)
        self.encoder_hid_proj: nn.Module | None = None  # of picture prompts, while an IP-Adapter is loaded
        self.out_channels = out_channels or in_channels
        self.norm_out = Modulation(self.inner_dim, 2)
        self.proj_out = Linear(self.inner_dim, patch_size * patch_size * self.out_channels)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None, timestep: torch.Tensor | float | None = None,
        block_controlnet_hidden_states: Sequence[torch.Tensor] | None = None,
        joint_attention_kwargs: AttentionOptions | None = None, return_dict: bool = True,
        skip_layers: Collection[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:  # fmt: skip
        """Predicts.

        Args:
            hidden_states: Noisy latents (B, in_channels, H, W), H and W multiples of ``patch_size``.
            encoder_hidden_states: Text tokens (B, M, joint_attention_dim).
            pooled_projections: Pooled text (B, pooled_projection_dim).
            timestep: One time in 0..1000, or (B,) of them.
            block_controlnet_hidden_states: Residuals (B, N, C), spread over the blocks: the i-th of n blocks is followed by that of
                index ``i / (n / count)``, rounded down; the last block by none.
            joint_attention_kwargs: :class:`~sfumato.models.layers.options.AttentionOptions`, or nothing.
            return_dict: Return :class:`Transformer2DModelOutput`, otherwise a tuple.
            skip_layers: Blocks to leave out (skip-layer guidance); residuals are added all the same.

        Returns:
            The prediction (B, out_channels, H, W).

        Raises:
            ValueError: An argument is unknown to the network, missing, or does not fit.
        """
        options, count = read_options("joint_attention_kwargs", joint_attention_kwargs), len(self.transformer_blocks)
        skipped = frozenset(skip_layers or ())
        if unknown := skipped.difference(range(count)):
            raise ValueError(f"skip_layers names block {min(unknown)}: this network has the blocks 0 to {count - 1}")
        check_shape("hidden_states", hidden_states, (None, self.config.in_channels, None, None))
        assert self.pos_embed is not None
        height, width = (side // self.config.patch_size for side in hidden_states.shape[2:])
        x = self.pos_embed(hidden_states)
        text, joint = self._start(x, (height, width), encoder_hidden_states, pooled_projections, timestep, options)
        residuals = block_controlnet_hidden_states or ()
        check_residuals("block_controlnet_hidden_states", residuals, count, x)
        for i, block in enumerate(self.transformer_blocks):
            if i not in skipped and not options.perturbs(block, "skip"):
                x, text = self.run_block(block, x, text, joint)
            if residuals and i < count - 1:
                x = x + residuals[int(i / (count / len(residuals)))]
        scale, shift = self.norm_out(joint.condition)
        x = self.proj_out(modulated(x, shift, scale))
        # (B, h * w, p * p * C) -> (B, C, h * p, w * p)
        patch = self.config.patch_size
        x = x.view(len(x), height, width, patch, patch, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, height * patch, width * patch)
        return Transformer2DModelOutput(x) if return_dict else (x,)


def check_residuals(name: str, residuals: Sequence[torch.Tensor], blocks: int, x: torch.Tensor) -> None:
    """Raises :class:`ValueError` unless there are at most as many residuals as blocks, each of a shape that adds to ``x``."""
    if len(residuals) > blocks:
        raise ValueError(f"{name} holds {len(residuals)} tensors for {blocks} blocks: pass at most one for each")
    for i, residual in enumerate(residuals):
        check_shape(f"{name}[{i}]", residual, (len(x), *x.shape[1:]), "the ControlNet must see latents of the same size and batch")
