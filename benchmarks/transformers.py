"""The denoisers of SDXL, Stable Diffusion 3.5 large and FLUX.1 dev at full width, few blocks, beside the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .measure import Row, alternate, megabytes, processor_seconds

SIDE = 32
"""Side of the picture in tokens; at 16 pixels a token 512 pixels."""


def pair(name: str, dtype: torch.dtype, **config: Any) -> dict[str, Any]:
    """The network of both libraries, over the same random weights."""
    import diffusers

    import sfumato

    made = {}
    for library in (diffusers, sfumato):
        with torch.device("meta"):
            made[library.__name__] = getattr(library, name)(**config).to(dtype).eval()
    weights = {key: torch.randn(value.shape) * 0.02 for key, value in made["diffusers"].state_dict().items()}
    weights = {key: value.to(dtype) for key, value in weights.items()}
    for network in made.values():
        network.load_state_dict(weights, assign=True)
    return made


def sd35_large(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Two blocks of Stable Diffusion 3.5 large, and arguments: 512 pixels, 333 text tokens."""
    widths = {"num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    networks = pair("SD3Transformer2DModel", dtype, num_layers=2, qk_norm="rms_norm", **widths)
    x, text, pooled = torch.randn(1, 16, 2 * SIDE, 2 * SIDE), torch.randn(1, 333, 4096), torch.randn(1, 2048)
    tensors = {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled}
    return networks, {**{key: value.to(dtype) for key, value in tensors.items()}, "timestep": torch.tensor([500.0])}


def flux_dev(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Two joint and four single blocks of FLUX.1 dev, and arguments: 512 pixels, 512 text tokens."""
    networks = pair("FluxTransformer2DModel", dtype, num_layers=2, num_single_layers=4, guidance_embeds=True)
    x, text, pooled = torch.randn(1, SIDE * SIDE, 64), torch.randn(1, 512, 4096), torch.randn(1, 768)
    tensors = {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled}
    number = torch.arange(SIDE * SIDE)
    places = torch.stack([0 * number, number // SIDE, number % SIDE], dim=1).float()
    others = {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]), "img_ids": places, "txt_ids": torch.zeros(512, 3)}
    return networks, {**{key: value.to(dtype) for key, value in tensors.items()}, **others}


def sdxl_unet(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The finest and the coarsest stage and the middle of SDXL's U-Net, shallow, and arguments: 512 pixels, batch 1."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    widths = {"block_out_channels": (320, 1280), "attention_head_dim": (5, 20), "transformer_layers_per_block": (1, 2)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    config = {"cross_attention_dim": 2048, "use_linear_projection": True, "layers_per_block": 1}
    networks = pair("UNet2DConditionModel", dtype, **blocks, **widths, **added, **config)
    tensors = {"sample": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 77, 2048)}
    sizes = {"text_embeds": torch.randn(1, 1280).to(dtype), "time_ids": torch.rand(1, 6).to(dtype)}
    return networks, {**{k: v.to(dtype) for k, v in tensors.items()}, "timestep": torch.tensor(500), "added_cond_kwargs": sizes}


def case_sdxl(runs: int) -> Iterator[Row]:
    """A forward of SDXL's U-Net, finest and coarsest stage and middle at full width, few layers, 512 pixels; processor time."""
    yield from forwards((("SDXL U-Net", sdxl_unet),), runs)


def case_transformers(runs: int) -> Iterator[Row]:
    """A forward of SD 3.5 large (2 blocks) and FLUX.1 dev (2 joint, 4 single blocks) at full width, 512 pixels; processor time."""
    yield from forwards((("SD 3.5 large", sd35_large), ("FLUX.1 dev", flux_dev)), runs)


def forwards(cases: Iterable[tuple[str, Any]], runs: int) -> Iterator[Row]:
    """Processor time, turn by turn, and memory of a forward, in float32 and in bfloat16."""
    for name, make in cases:
        for dtype in (torch.float32, torch.bfloat16):
            networks, arguments = make(dtype)

            def forward(network: Any, arguments: Any = arguments) -> None:
                with torch.no_grad():
                    network(**arguments)

            case = f"{name}, {str(dtype)[6:]}"
            for unit, measure, turns in (("s", processor_seconds, runs), ("MB", megabytes, 1)):
                functions = {key: lambda n=n, m=measure: m(lambda: forward(n)) for key, n in networks.items()}
                found = alternate(functions, turns)
                yield case if unit == "s" else f"{case}, memory above the weights", unit, found["diffusers"], found["sfumato"]
            del networks
