"""Configurations of U-Nets: tiny ones of every published shape, and the published ones themselves."""

from __future__ import annotations

from typing import Any

CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
TINY: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "down_block_types": CROSS_DOWN,
    "up_block_types": CROSS_UP,
}
SDXL = {
    "down_block_types": CROSS_DOWN[::-1],
    "up_block_types": CROSS_UP[::-1],
    "attention_head_dim": (4, 8),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 56,
}
DEEPFLOYD = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "cross_attention_dim": 64,
    "attention_head_dim": 16,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.41421,
    "mid_block_scale_factor": 1.41421,
    "time_embedding_act_fn": "gelu",
}
K_UPSCALER = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": None,
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "mid_block_type": None,
    "act_fn": "gelu",
    "in_channels": 8,
    "out_channels": 5,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "time_cond_proj_dim": 10,
    "timestep_post_act": "gelu",
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_norm": "layer_norm",
}
KANDINSKY = {
    **{k: DEEPFLOYD[k] for k in ("block_out_channels", "down_block_types", "up_block_types", "mid_block_type")},
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
    "out_channels": 8,
    "encoder_hid_dim": 20,
}
CONDITIONED: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"attention_head_dim": (4, 8), "use_linear_projection": True, "upcast_attention": True},
    "three levels": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    },
    "uneven layers": {"layers_per_block": (1, 2), "reverse_transformer_layers_per_block": (1, 2), "downsample_padding": 0},
    "depth of each layer": {
        "transformer_layers_per_block": (1, (2,)),
        "reverse_transformer_layers_per_block": ((1, 2), (2, 1)),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "sdxl": SDXL,
    "sdxl refiner": {**SDXL, "projection_class_embeddings_input_dim": 50},
    "x4 upscaler": {
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": (True, False),
        "down_block_types": CROSS_DOWN[::-1],
        "up_block_types": CROSS_UP[::-1],
    },
    "only cross attention": {"only_cross_attention": True},
    "latent upscaler": K_UPSCALER,
    "deepfloyd": DEEPFLOYD,
    "deepfloyd upscaler": {**DEEPFLOYD, "class_embed_type": "timestep", "only_cross_attention": True, "act_fn": "silu"},
    "deepfloyd middle": {**DEEPFLOYD, "only_cross_attention": True, "mid_block_only_cross_attention": False},
    "kandinsky 2.1": {**KANDINSKY, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"},
    "kandinsky 2.2": {**KANDINSKY, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
    "kandinsky hint": {**KANDINSKY, "in_channels": 8, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image_hint"},
    "unclip decoder": {
        **KANDINSKY,
        "encoder_hid_dim": None,
        "class_embed_type": "identity",
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
    },
    "classes projected": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "classes concatenated": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 10,
        "class_embeddings_concat": True,
    },
    "lcm": {
        "time_cond_proj_dim": 10,
        "time_embedding_dim": 48,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "pixel attention": {
        "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "resnet_out_scale_factor": 1.3,
        "resnet_skip_time_act": True,
        "mid_block_scale_factor": 1.2,
    },
    "no middle": {"mid_block_type": None, "act_fn": "mish", "time_embedding_act_fn": "silu"},
}
PLAIN: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NCSN = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.41421,
    "attention_head_dim": None,
}
UNCONDITIONED: dict[str, dict[str, Any]] = {
    "ddpm": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "one head": {"attention_head_dim": None, "layers_per_block": 2, "act_fn": "relu", "center_input_sample": True},
    "ncsnpp": NCSN,
    "consistency": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "num_class_embeds": 7,
    },
    "attention first": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "learned times": {"time_embedding_type": "learned", "num_train_timesteps": 100, "add_attention": False},
    "class by time": {"class_embed_type": "timestep", "mid_block_type": None, "time_embedding_dim": 40},
    "class as it is": {"class_embed_type": "identity"},
}

# Published configurations.
SD15: dict[str, Any] = {
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
IF_STAGE_1 = {
    **{k: v for k, v in DEEPFLOYD.items() if k not in ("block_out_channels", "addition_embed_type_num_heads")},
    "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 2816,
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1.5": SD15,
    "SD 2.1": {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "SDXL base": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXL refiner": {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
    "x4 upscaler": {
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "only_cross_attention": (True, True, True, False),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
    "latent upscaler": {
        **K_UPSCALER,
        "block_out_channels": (384, 384, 768, 768),
        "layers_per_block": 4,
        "cross_attention_dim": 768,
        "attention_head_dim": 64,
        "time_cond_proj_dim": 896,
    },
    "IF stage 1": IF_STAGE_1,
    "Kandinsky 2.2": {
        **{
            k: IF_STAGE_1[k]
            for k in ("layers_per_block", "down_block_types", "up_block_types", "mid_block_type", "attention_head_dim")
        },
        "block_out_channels": (384, 768, 1152, 1536),
        "cross_attention_dim": 768,
        "out_channels": 8,
        "encoder_hid_dim": 1280,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
        "resnet_time_scale_shift": "scale_shift",
    },
}
