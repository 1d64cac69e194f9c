"""Configurations of transformers and their ControlNets: tiny ones, and those of published checkpoints."""

from __future__ import annotations

from typing import Any

SD3 = {
    "sample_size": 16, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 12,
}  # fmt: skip
FLUX = {
    "num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "in_channels": 16,
}  # fmt: skip
NORMS = {"qk_norm": "rms_norm"}
PLAIN_BLOCKS = {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None}
HINT = {"patch_size": 2, "conditioning_embedding_channels": 4, "num_single_layers": 0}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5 large": ("SD3Transformer2DModel", {**SD3, **NORMS}),
    "sd3.5 medium": ("SD3Transformer2DModel", {**SD3, **NORMS, "dual_attention_layers": (0, 2)}),
    "flux schnell": ("FluxTransformer2DModel", FLUX),
    "flux dev": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}),
    "flux fill": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True, "in_channels": 40, "out_channels": 16}),
    "sd3 controlnet": ("SD3ControlNetModel", {**SD3, "num_layers": 2, "extra_conditioning_channels": 1}),
    "sd3.5 medium controlnet": ("SD3ControlNetModel", {**SD3, **NORMS, "num_layers": 2, "dual_attention_layers": (0, 1)}),
    "sd3.5 large controlnet": ("SD3ControlNetModel", {**SD3, **NORMS, **PLAIN_BLOCKS, "num_layers": 2}),
    "sd3 controlnet without places": ("SD3ControlNetModel", {**SD3, "num_layers": 2, "pos_embed_type": None}),
    "flux controlnet": ("FluxControlNetModel", {**FLUX, "num_layers": 2, "guidance_embeds": True}),
    "flux union controlnet": ("FluxControlNetModel", {**FLUX, "num_mode": 5}),
    "flux hint controlnet": ("FluxControlNetModel", {**FLUX, **HINT}),
}
MAIN = ["sd3", "sd3.5 large", "sd3.5 medium", "flux schnell", "flux dev", "flux fill"]
CONTROL = [name for name in TINY if "controlnet" in name]

SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, **NORMS}
SD35_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384, **NORMS}
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
DEV = {"guidance_embeds": True}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3 medium": ("SD3Transformer2DModel", SD3_MEDIUM),
    "sd3.5 large": ("SD3Transformer2DModel", SD35_LARGE),
    "sd3.5 medium": ("SD3Transformer2DModel", {**SD35_MEDIUM, "dual_attention_layers": tuple(range(13))}),
    "flux dev": ("FluxTransformer2DModel", DEV),
    "flux schnell": ("FluxTransformer2DModel", {}),
    "flux fill": ("FluxTransformer2DModel", {**DEV, "in_channels": 384, "out_channels": 64}),
    "flux canny": ("FluxTransformer2DModel", {**DEV, "in_channels": 128, "out_channels": 64}),
    "sd3 canny": ("SD3ControlNetModel", {**SD3_MEDIUM, "num_layers": 12}),
    "sd3 inpainting": ("SD3ControlNetModel", {**SD3_MEDIUM, "num_layers": 23, "extra_conditioning_channels": 1}),
    "sd3.5 large canny": ("SD3ControlNetModel", {**SD35_LARGE, **PLAIN_BLOCKS, "num_layers": 19}),
    "flux canny controlnet": ("FluxControlNetModel", {**DEV, "num_layers": 5, "num_single_layers": 0}),
    "flux union": ("FluxControlNetModel", {**DEV, "num_layers": 5, "num_single_layers": 10, "num_mode": 10}),
    "flux union pro 2": ("FluxControlNetModel", {**DEV, "num_layers": 6, "num_single_layers": 0}),
    "flux hint": (
        "FluxControlNetModel",
        {**DEV, "num_layers": 2, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 16},
    ),
}  # fmt: skip
