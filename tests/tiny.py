"""Tiny random checkpoints, written by the reference in its own format."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 numbers that are the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: torch.nn.Module) -> Any:
    """Gives every parameter a value that matters: biases too, and weights of normalisations around 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(values / p[0].numel() ** 0.5 if p.dim() > 1 else values * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer of single bytes and a few words."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + "</w>" for a in alphabet)])}
    merges = []
    for word in ("red", "cat", "blue"):
        merges += [
            f"{word[0]} {word[1]}",
            *(f"{word[:i]} {word[i]}" for i in range(2, len(word) - 1)),
            f"{word[:-1]} {word[-1]}</w>",
        ]
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def unet(**changes: Any) -> Any:
    """A tiny conditional U-Net."""
    config: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def vae(**changes: Any) -> Any:
    """A tiny autoencoder, two pixels per latent."""
    config: dict[str, Any] = dict(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    return diffusers.AutoencoderKL(**{**config, **changes})


def text_encoder(vocab_size: int, projected: bool = False, **changes: Any) -> Any:
    """A tiny CLIP text model, perhaps with projection."""
    config: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
    )
    config |= dict(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1, projection_dim=32)
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = cls(transformers.CLIPTextConfig(**{**config, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            torch.nn.init.normal_(parameter, mean=0.5)  # trained encoders have a mean; weighted prompts preserve it
    return model


def safety_checker() -> Any:
    """A tiny safety checker that objects to nearly everything."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    config = transformers.CLIPConfig(text_config=dict(hidden_size=16), vision_config=vision, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config).eval()
    for name, parameter in checker.named_parameters():
        if "embeds" in name:
            parameter.data = torch.randn(parameter.shape) if not name.endswith("weights") else torch.full(parameter.shape, 0.3)
    return checker


def scheduler(name: str = "DDIMScheduler", **changes: Any) -> Any:
    """A scheduler with the noise table of Stable Diffusion."""
    config: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return getattr(diffusers, name)(**{**config, **changes})


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A smooth random picture, width x height."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask whose middle is painted anew."""
    array = np.zeros((size[1], size[0]), dtype=np.uint8)
    array[size[1] // 4 : size[1] * 3 // 4, size[0] // 4 : size[0] * 3 // 4] = 255
    return Image.fromarray(array)


def image_processor() -> Any:
    """What prepares pictures for the tiny vision models."""
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def depth_estimator() -> Any:
    """A tiny depth model."""
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        num_channels=3, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False, readout_type="project",
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config).eval()


def image_encoder() -> Any:
    """A tiny CLIP vision model with projection."""
    config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config, projection_dim=32)).eval()


def siglip() -> tuple[Any, Any]:
    """A tiny SigLIP vision model and what prepares its pictures."""
    config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config)).eval(), processor


def build(name: str, folder: Path) -> Any:
    """Builds the tiny reference pipeline ``name`` and saves it in ``folder``; the same weights on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = _BUILDERS.get(name, _stable_diffusion)(name, folder)
    pipe.save_pretrained(folder)
    pipe = type(pipe).from_pretrained(folder)  # so that both libraries start from what the files say
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text(folder: Path, **changes: Any) -> dict[str, Any]:
    words = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    return dict(tokenizer=words, text_encoder=text_encoder(len(words), **changes))


def _stable_diffusion(name: str, folder: Path) -> Any:
    channels = {"StableDiffusionInstructPix2PixPipeline": 8, "inpaint9": 9}.get(name, 4)
    cls = getattr(diffusers, "StableDiffusionInpaintPipeline" if name == "inpaint9" else name)
    parts = dict(unet=unet(in_channels=channels), vae=vae(), scheduler=scheduler(), safety_checker=None, feature_extractor=None)
    return cls(**parts, **_text(folder), requires_safety_checker=False)


def _latent_consistency(name: str, folder: Path) -> Any:
    parts = dict(unet=unet(time_cond_proj_dim=16), vae=vae(), scheduler=scheduler("LCMScheduler"), safety_checker=None)
    return getattr(diffusers, name)(**parts, **_text(folder), feature_extractor=None, requires_safety_checker=False)


def _depth(name: str, folder: Path) -> Any:
    parts = dict(unet=unet(in_channels=5), vae=vae(), scheduler=scheduler(), depth_estimator=depth_estimator())
    extractor = transformers.DPTImageProcessor(size={"height": 16, "width": 16})
    return diffusers.StableDiffusionDepth2ImgPipeline(**parts, **_text(folder), feature_extractor=extractor)


def _upscale(name: str, folder: Path) -> Any:
    denoiser = unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    parts = dict(unet=denoiser, vae=vae(), scheduler=scheduler(), low_res_scheduler=scheduler("DDPMScheduler"))
    return diffusers.StableDiffusionUpscalePipeline(**parts, **_text(folder), max_noise_level=350)


def _latent_upscale(name: str, folder: Path) -> Any:
    denoiser = unet(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=[32, 32, 64, 64], time_cond_proj_dim=160,
        conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=32, in_channels=8, out_channels=5,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None, only_cross_attention=False, resnet_time_scale_shift="scale_shift", time_embedding_type="fourier",
        timestep_post_act="gelu",
    )  # fmt: skip
    parts = dict(unet=denoiser, vae=vae(), scheduler=scheduler("EulerDiscreteScheduler", prediction_type="sample"))
    return diffusers.StableDiffusionLatentUpscalePipeline(**parts, **_text(folder))


def _variation(name: str, folder: Path) -> Any:
    parts = dict(unet=unet(), vae=vae(), scheduler=scheduler(), image_encoder=image_encoder(), feature_extractor=image_processor())
    return diffusers.StableDiffusionImageVariationPipeline(**parts, safety_checker=None, requires_safety_checker=False)


def _stable_diffusion_xl(name: str, folder: Path) -> Any:
    words, refiner = tokenizer(folder.parent / f"{folder.name}-tokenizer"), name == "refiner"
    scored = "Img2Img" in name or "Inpaint" in name or refiner
    denoiser = unet(
        in_channels={"xl inpaint9": 9, "StableDiffusionXLInstructPix2PixPipeline": 8}.get(name, 4),
        attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + 32, cross_attention_dim=32 if refiner else 64,
    )  # fmt: skip
    encoders = dict(text_encoder=None, tokenizer=None) if refiner else dict(text_encoder=text_encoder(len(words)), tokenizer=words)
    second = text_encoder(len(words), projected=True, hidden_act="gelu")
    cls = getattr(
        diffusers,
        {"refiner": "StableDiffusionXLImg2ImgPipeline", "xl inpaint9": "StableDiffusionXLInpaintPipeline"}.get(name, name),
    )
    options = {"requires_aesthetics_score": refiner} if scored else {}
    return cls(
        vae=vae(), unet=denoiser, scheduler=scheduler("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
        text_encoder_2=second, tokenizer_2=words, **encoders, **options,
    )  # fmt: skip


def t5(width: int) -> tuple[Any, Any]:
    """A tiny T5 encoder and a tokenizer of single characters."""
    alphabet = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,.()[]:0123456789"]
    tokens = transformers.T5Tokenizer(vocab=[(c, 0.0 if i < 3 else -1.0) for i, c in enumerate(alphabet)], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokens), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tokens, transformers.T5EncoderModel(config).eval()


def flow_vae(channels: int = 4, shift: float = 0.0609) -> Any:
    """A tiny autoencoder with a shift and without quantising convolutions, whose posterior has next to no variance.

    So that it does not matter that the reference draws control pictures from the global generator.
    """
    model = vae(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=shift, scaling_factor=1.5035, latent_channels=channels
    )
    with torch.no_grad():
        model.encoder.conv_out.weight[channels:].zero_()
        model.encoder.conv_out.bias[channels:] = -30.0
    return model


def _stable_diffusion_3(name: str, folder: Path) -> Any:
    words = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokens, third = t5(64)
    painting = name == "StableDiffusion3InpaintPipeline"
    channels = 16 if painting else 4
    config: dict[str, Any] = dict(
        sample_size=16, patch_size=1, in_channels=channels, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=channels,
    )  # fmt: skip
    config |= dict(patch_size=2, qk_norm="rms_norm", dual_attention_layers=(0,), pos_embed_max_size=16, joint_attention_dim=64)
    denoiser = diffusers.SD3Transformer2DModel(**config)
    clips = [text_encoder(len(words), projected=True) for _ in range(2)]
    parts: dict[str, Any] = dict(text_encoder=clips[0], text_encoder_2=clips[1], text_encoder_3=third)
    parts |= dict(tokenizer=words, tokenizer_2=words, tokenizer_3=tokens, transformer=denoiser)
    parts["vae"] = flow_vae(channels, 0.0 if painting else 0.0609)  # the reference's inpainting decodes without the shift
    if "ControlNet" in name:
        changes = {"num_layers": 2, "dual_attention_layers": (), "extra_conditioning_channels": int("Inpainting" in name)}
        network = diffusers.SD3ControlNetModel(**{**config, **changes})
        generator = torch.Generator().manual_seed(0)
        for key, parameter in network.named_parameters():
            if "controlnet_blocks" in key or "pos_embed_input" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parts["controlnet"] = network
    scheduler_ = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return getattr(diffusers, name)(scheduler=scheduler_, **parts)


FLUX = {
    **dict.fromkeys(("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"), 16),
    **dict.fromkeys(("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"), 16),
    **dict.fromkeys(("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"), 32),
    "FluxKontextInpaintPipeline": 16,
    "FluxFillPipeline": 48,
    "schnell": 16,
}
"""Pipelines and the channels of their denoiser."""


def _flux(name: str, folder: Path) -> Any:
    words = tokenizer(folder.parent / f"{folder.name}-tokenizer")
    tokens, second = t5(32)
    config: dict[str, Any] = dict(
        patch_size=1, in_channels=FLUX[name], out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    dev = name != "schnell"
    parts: dict[str, Any] = dict(
        transformer=diffusers.FluxTransformer2DModel(**config, guidance_embeds=dev), vae=flow_vae(), tokenizer=words,
        text_encoder=text_encoder(len(words)), text_encoder_2=second, tokenizer_2=tokens,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
    )  # fmt: skip
    if "ControlNet" in name:
        sizes = {"num_layers": 1, "num_single_layers": 1, "num_mode": 3, "guidance_embeds": True}
        shared = {k: v for k, v in config.items() if k != "out_channels"}
        network = diffusers.FluxControlNetModel(**{**shared, **sizes})
        generator = torch.Generator().manual_seed(0)
        for key, parameter in network.named_parameters():
            if "controlnet_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parts["controlnet"] = network
    return getattr(diffusers, name if dev else "FluxPipeline")(**parts)


def control_net(denoiser: Any, seed: int = 0, cls: str = "ControlNetModel") -> Any:
    """A tiny control network that follows a U-Net, with residuals that are not zero."""
    own: dict[str, Any] = {"conditioning_embedding_out_channels": (8, 16)}
    if "Union" in cls:
        own |= {"num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 16}
    known = inspect.signature(getattr(diffusers, cls)).parameters
    shared = {key: value for key, value in denoiser.config.items() if key in known}
    network = getattr(diffusers, cls)(**{**shared, **own})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "controlnet_" in name or "task_embedding" in name or "spatial_ch" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network


def _with_control(name: str, folder: Path) -> Any:
    base = CONTROLLED[name]
    pipe = _stable_diffusion_xl(base, folder) if "XL" in base else _stable_diffusion(base, folder)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    parts["scheduler"] = scheduler()  # as it is, not as the other pipeline's constructor changed it
    options = {} if "XL" in base else {"requires_safety_checker": False}
    if "Adapter" in name:
        adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
        return getattr(diffusers, name)(**parts, adapter=adapter, **options)
    if name.endswith("multi"):
        networks: Any = [control_net(pipe.unet, seed) for seed in (0, 1)]
        return getattr(diffusers, name.removesuffix(" multi"))(**parts, controlnet=networks, **options)
    if "XS" in name:
        parts["unet"] = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": 2})
        slim = diffusers.ControlNetXSAdapter.from_unet(parts["unet"], 0.5, conditioning_embedding_out_channels=(8, 16))
        for key, parameter in slim.named_parameters():
            if "base" in key or "cond_embedding" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        return getattr(diffusers, name)(**parts, controlnet=slim, **options)
    network = control_net(pipe.unet, cls="ControlNetUnionModel" if "Union" in name else "ControlNetModel")
    return getattr(diffusers, name)(**parts, controlnet=network, **options)


CONTROLLED = {
    "StableDiffusionControlNetPipeline": "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline multi": "StableDiffusionPipeline",
    "StableDiffusionControlNetImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionAdapterPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetPipeline multi": "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline": "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLAdapterPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionControlNetXSPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLControlNetXSPipeline": "StableDiffusionXLPipeline",
}
"""Pipelines with control networks or adapters, and what they are without."""


PAG = (
    "StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPAGInpaintPipeline", "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline", "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline",
)  # fmt: skip
"""Pipelines with perturbed-attention guidance."""


def _with_pag(name: str, folder: Path) -> Any:
    plain = name.replace("PAG", "")
    base, known = _BUILDERS.get(plain, _stable_diffusion)(plain, folder), inspect.signature(getattr(diffusers, name)).parameters
    options = {"requires_safety_checker": False, "requires_aesthetics_score": False}
    parts = {key: value for key, value in {**base.components, **options}.items() if key in known}
    if "transformer" in parts:  # where queries and keys are normalised, the reference forgets it in the perturbed layers
        parts["transformer"] = type(base.transformer)(**{**base.transformer.config, "qk_norm": None})
    return getattr(diffusers, name)(**parts)


def pixel_unet(**changes: Any) -> Any:
    """A tiny unconditional U-Net."""
    config: dict[str, Any] = dict(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return diffusers.UNet2DModel(**{**config, **changes})


def _pixels(name: str, folder: Path) -> Any:
    return getattr(diffusers, name)(unet=pixel_unet(), scheduler=diffusers.DDPMScheduler())


def _super_resolution(name: str, folder: Path) -> Any:
    vq = diffusers.VQModel(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, norm_num_groups=8,
    )  # fmt: skip
    vq.quantize.embedding.weight.data.normal_()  # codes as far apart as trained ones, so that rounding cannot flip a choice
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=vq, unet=pixel_unet(in_channels=6, out_channels=3, sample_size=32), scheduler=diffusers.DDIMScheduler()
    )


_BUILDERS = {
    **dict.fromkeys(FLUX, _flux),
    **dict.fromkeys(("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"), _stable_diffusion_3),
    **dict.fromkeys(("StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline"), _stable_diffusion_3),
    "StableDiffusion3ControlNetInpaintingPipeline": _stable_diffusion_3,
    **dict.fromkeys(CONTROLLED, _with_control),
    **dict.fromkeys(PAG, _with_pag),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "refiner"), _stable_diffusion_xl),
    **dict.fromkeys(("StableDiffusionXLInpaintPipeline", "xl inpaint9"), _stable_diffusion_xl),
    "StableDiffusionXLInstructPix2PixPipeline": _stable_diffusion_xl,
    **dict.fromkeys(("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"), _latent_consistency),
    "StableDiffusionDepth2ImgPipeline": _depth,
    "StableDiffusionUpscalePipeline": _upscale,
    "StableDiffusionLatentUpscalePipeline": _latent_upscale,
    "StableDiffusionImageVariationPipeline": _variation,
    "DDPMPipeline": _pixels,
    "DDIMPipeline": _pixels,
    "LDMSuperResolutionPipeline": _super_resolution,
}
