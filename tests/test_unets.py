"""The two-dimensional U-Nets against the reference's: outputs, state dictionaries, and what a user can get wrong."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sfumato.errors import ConfigError
from sfumato.models.unets.unet_2d import UNet2DModel
from sfumato.models.unets.unet_2d_condition import UNet2DConditionModel

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
    "kandinsky hint": {
        **KANDINSKY,
        "in_channels": 8,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image_hint",
    },
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
    "lcm": {"time_cond_proj_dim": 10, "time_embedding_dim": 48, "center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1},
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


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: torch.nn.Module) -> Any:
    """Gives every parameter a value that matters, biases and norms included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            is_matrix = p.dim() > 1
            p.copy_(values / p[0].numel() ** 0.5 if is_matrix else values * 0.2 + (1.0 if "norm" in name else 0.0))
    return model.eval()


def reference(name: str) -> Any:
    if name in CONDITIONED:
        return randomize(diffusers.UNet2DConditionModel(**{**TINY, **CONDITIONED[name]}))
    return randomize(diffusers.UNet2DModel(**{**PLAIN, **UNCONDITIONED[name]}))


def ours(name: str) -> Any:
    cls, base = (UNet2DConditionModel, TINY) if name in CONDITIONED else (UNet2DModel, PLAIN)
    return randomize(cls(**{**base, **CONDITIONED.get(name, UNCONDITIONED.get(name, {}))}))


def inputs(config: Any, size: int = 16) -> dict[str, Any]:
    """Arguments that fit a configuration."""
    channels = config["in_channels"] - (4 if config.get("addition_embed_type") == "image_hint" else 0)
    result: dict[str, Any] = {"sample": noise(2, channels, size, size), "timestep": 7}
    if config.get("time_embedding_type") == "fourier":
        result["timestep"] = torch.tensor([0.7, 1.3])
    kind = config.get("class_embed_type")
    time_dim = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
    if kind in ("projection", "simple_projection"):
        result["class_labels"] = noise(2, 10, seed=3)
    elif kind == "identity":
        result["class_labels"] = noise(2, time_dim, seed=3)
    elif kind == "timestep" or config.get("num_class_embeds"):
        result["class_labels"] = torch.tensor([3, 5])
    if "cross_attention_dim" not in config:
        return result
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    result["encoder_hidden_states"] = noise(2, 5, width, seed=4)
    if config["time_cond_proj_dim"]:
        result["timestep_cond"] = noise(2, config["time_cond_proj_dim"], seed=5)
    added, addition = {}, config["addition_embed_type"]
    if addition == "text_time":
        numbers = (config["projection_class_embeddings_input_dim"] - 20) // config["addition_time_embed_dim"]
        added = {"text_embeds": noise(2, 20, seed=6), "time_ids": torch.arange(2 * numbers).reshape(2, -1) * 10}
    elif addition == "text_image":
        added = {"text_embeds": noise(2, 24, seed=6), "image_embeds": noise(2, 24, seed=7)}
    elif addition in ("image", "image_hint"):
        result["encoder_hidden_states"] = None
        added = {"image_embeds": noise(2, 20, seed=7)}
    if addition == "image_hint":
        added["hint"] = noise(2, 3, 8 * size, 8 * size, seed=8)
    if added:
        result["added_cond_kwargs"] = added
    return result


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


ALL = [*CONDITIONED, *UNCONDITIONED]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_outputs_and_files_equal_the_reference(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = (UNet2DConditionModel if name in CONDITIONED else UNet2DModel).from_pretrained(tmp_path / "theirs")
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in loaded.state_dict().items()} == shapes
    arguments = inputs(theirs.config)
    expected = theirs(**arguments).sample
    assert_same(loaded(**arguments).sample, expected)
    assert_same(loaded(**arguments, return_dict=False)[0], expected)
    loaded.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(**arguments).sample, expected)
