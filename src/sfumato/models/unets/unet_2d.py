"""The unconditional U-Net of pixel and latent diffusion (arXiv:2006.11239; NCSN++: arXiv:2011.13456)."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import ConfigError, check_choice
from ..layers.attention import upgrade_attention_names
from ..layers.compute import Conv2d, pixels_last
from ..layers.embeddings import GaussianFourierProjection, TimestepEmbedding, time_tensor
from ..layers.resnet import activation
from .base import UNet2DOutput, UNetBase, shared_options
from .blocks import Conditions, Level, MidBlock, spread
from .skip_blocks import SkipDownBlock, SkipUpBlock

_RESAMPLERS = {"conv": "conv", "resnet": "resnet", None: "conv"}


class UNet2DModel(UNetBase):
    """A U-Net that predicts from a noisy sample and its time, and perhaps a class.

    Args:
        sample_size: Height and width it was trained for; information only.
        in_channels, out_channels: Of the sample and of the prediction.
        center_input_sample: The sample is given in 0..1 and moved to -1..1.
        time_embedding_type, time_embedding_dim: ``"positional"``, ``"fourier"`` or ``"learned"``; its width.
        freq_shift, flip_sin_to_cos: See :func:`~sfumato.models.layers.embeddings.sinusoids`.
        down_block_types, up_block_types: From the finest resolution; from the coarsest.
        mid_block_type, add_attention, mid_block_scale_factor: ``"UNetMidBlock2D"`` or ``None``; its attention; divides its outputs.
        block_out_channels, layers_per_block: Channels and residual layers of each resolution; up blocks have one layer more.
        downsample_padding, downsample_type, upsample_type: How blocks halve; ``"conv"`` or ``"resnet"`` in blocks with attention.
        dropout, act_fn: In residual layers; ``"silu"``, ``"swish"``, ``"mish"``, ``"gelu"`` or ``"relu"``.
        attention_head_dim: Width of an attention head; ``None`` for a single head.
        norm_num_groups, norm_eps: Of the normalisations.
        attn_norm_num_groups: Of the attention in the middle; by default as the others, or none with ``scale_shift``.
        resnet_time_scale_shift: ``"default"`` adds the time embedding, ``"scale_shift"`` modulates with it.
        class_embed_type, num_class_embeds: ``None``, ``"timestep"`` or ``"identity"``; number of classes.
        num_train_timesteps: Number of times, for learned time embeddings.

    Raises:
        ConfigError: Values are unknown or do not fit together.
    """

    def __init__(
        self, sample_size: int | tuple[int, int] | None = None, in_channels: int = 3, out_channels: int = 3,
        center_input_sample: bool = False, time_embedding_type: str = "positional", time_embedding_dim: int | None = None,
        freq_shift: int = 0, flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896), layers_per_block: int = 2, mid_block_scale_factor: float = 1,
        downsample_padding: int = 1, downsample_type: str = "conv", upsample_type: str = "conv", dropout: float = 0.0,
        act_fn: str = "silu", attention_head_dim: int | None = 8, norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None, norm_eps: float = 1e-5, resnet_time_scale_shift: str = "default",
        add_attention: bool = True, class_embed_type: str | None = None, num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._check_config()
        time_dim = time_embedding_dim or block_out_channels[0] * 4
        shared = shared_options(self.config, time_dim)
        self.conv_in = Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self._build_time(block_out_channels[0], time_dim)
        for key in ("downsample_type", "upsample_type"):
            check_choice(key, self.config[key], _RESAMPLERS)
        resamplers = (_RESAMPLERS[downsample_type], _RESAMPLERS[upsample_type])
        level = Level(head_dim=attention_head_dim, groups=norm_num_groups)
        count = len(down_block_types)
        self._build(shared, [level] * count, spread(layers_per_block, count, "layers_per_block"), None, resamplers, False)
        if in_channels != 3 and any(isinstance(b, (SkipDownBlock, SkipUpBlock)) for b in (*self.down_blocks, *self.up_blocks)):
            raise ConfigError(f"in_channels={in_channels}: blocks of the Skip types carry a picture of 3 channels")
        check_choice("mid_block_type", mid_block_type, ("UNetMidBlock2D", None))
        if attn_norm_num_groups is None and resnet_time_scale_shift == "default":
            attn_norm_num_groups = norm_num_groups
        mid = Level(head_dim=attention_head_dim, groups=attn_norm_num_groups)
        self.mid_block = None
        if mid_block_type is not None:
            attention = "pixel" if add_attention else None
            self.mid_block = MidBlock(attention, shared, mid, block_out_channels[-1], mid_block_scale_factor)
        self._build_out(norm_num_groups, "silu")
        self.activation = activation(act_fn)

    def _build_time(self, width: int, time_dim: int) -> None:
        config, kind = self.config, self.config.time_embedding_type
        check_choice("time_embedding_type", kind, ("positional", "fourier", "learned"))
        check_choice("class_embed_type", config.class_embed_type, (None, "timestep", "identity"))
        if kind == "fourier":
            self.time_proj: nn.Module = GaussianFourierProjection(width, scale=16, log=True, flip_sin_to_cos=False)
        elif kind == "learned":
            if not config.num_train_timesteps:
                raise ConfigError("time_embedding_type='learned' needs num_train_timesteps, the number of times")
            self.time_proj = nn.Embedding(config.num_train_timesteps, width)
        self.time_embedding = TimestepEmbedding(2 * width if kind == "fourier" else width, time_dim)
        self._build_classes(width, time_dim)

    @classmethod
    def upgrade_state_dict(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames the attention projections of early checkpoints."""
        return upgrade_attention_names(tensors)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:  # fmt: skip
        """Predicts.

        Args:
            sample: Noisy sample ``(B, in_channels, H, W)``.
            timestep: One time, or ``(B,)`` of them; noise levels with ``time_embedding_type="fourier"``.
            class_labels: Classes ``(B,)``, or embeddings ``(B, D)`` with ``class_embed_type="identity"``.
            return_dict: Return :class:`UNet2DOutput`, otherwise a tuple.

        Returns:
            The prediction ``(B, out_channels, H, W)``.

        Raises:
            ValueError: An argument does not fit the sample or the network.
        """
        uneven = self._check_sample(sample)
        times = time_tensor(timestep, sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        dtype = self.conv_in.weight.dtype
        temb, classes = self.time_embedding(self.project_time(times).to(dtype)), self._embed_class(class_labels, dtype)
        if classes is not None:
            temb = temb + classes
        c = Conditions(temb, self.activation(temb))
        x, states = self._down(self.conv_in(pixels_last(sample)), c, picture=sample)
        if self.mid_block is not None:
            x = self.run_block(self.mid_block, x, c)
        x, picture = self._up(x, states, c, uneven)
        x = self._out(x)
        if picture is not None:
            x = x + picture
        if self.config.time_embedding_type == "fourier":
            x = (x / times.reshape(-1, 1, 1, 1)).to(x.dtype)
        return UNet2DOutput(x) if return_dict else (x,)
