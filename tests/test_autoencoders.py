"""The autoencoders against the reference's, both ways through a checkpoint folder, and against mathematics."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as ReferenceDistribution
from safetensors.torch import load_file, save_file
from tiny import noise, randomize

from sfumato.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from sfumato.models.autoencoders.autoencoder_kl import AutoencoderKL
from sfumato.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from sfumato.models.autoencoders.distribution import DiagonalGaussianDistribution
from sfumato.models.autoencoders.vq_model import VQModel

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
KL = {"down_block_types": DOWN, "up_block_types": UP, "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 32}
VQ = {"down_block_types": DOWN, "up_block_types": UP, "block_out_channels": (32, 64), "num_vq_embeddings": 16}
ASYM = {
    "down_block_types": DOWN * 2,
    "up_block_types": UP * 2,
    "down_block_out_channels": (8, 8, 16, 16),
    "up_block_out_channels": (12, 24, 48, 48),
    "layers_per_up_block": 2,
    "norm_num_groups": 4,
}
TINY = {
    "encoder_block_out_channels": (4, 4, 4, 4),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 2, 1, 1),
    "num_decoder_blocks": (1, 2, 1, 1),
}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "kl": (AutoencoderKL, KL),
    "kl_plain": (AutoencoderKL, {**KL, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}),
    "kl_flux": (AutoencoderKL, {**KL, "latent_channels": 16, "scaling_factor": 0.36, "shift_factor": 0.11, "force_upcast": False}),
    "kl_attention": (
        AutoencoderKL,
        {**KL, "down_block_types": ("AttnDownEncoderBlock2D",) * 2, "up_block_types": ("AttnUpDecoderBlock2D",) * 2},
    ),
    "kl_relu": (AutoencoderKL, {**KL, "act_fn": "relu", "layers_per_block": 2, "in_channels": 1, "out_channels": 2}),
    "tiny": (AutoencoderTiny, TINY),
    "tiny_gelu": (AutoencoderTiny, {**TINY, "act_fn": "gelu", "upsample_fn": "bilinear", "latent_channels": 16}),
    "asymmetric": (AsymmetricAutoencoderKL, ASYM),
    "vq": (VQModel, VQ),
    "vq_spatial": (VQModel, {**VQ, "norm_type": "spatial", "latent_channels": 4}),
    "vq_spatial_attention": (
        VQModel,
        {**VQ, "norm_type": "spatial", "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "layers_per_block": 2},
    ),
    "vq_embed": (VQModel, {**VQ, "vq_embed_dim": 6, "mid_block_add_attention": False}),
}


def pair(case: str, folder: Path, **extra: Any) -> tuple[Any, Any]:
    """Ours, loaded from what the reference wrote, and the reference."""
    ours, kwargs = CASES[case]
    reference = getattr(diffusers, ours.__name__)(**{**kwargs, **extra}).eval()
    randomize(reference)
    reference.save_pretrained(folder)
    return ours.from_pretrained(folder), reference


def picture(model: Any, height: int = 16, width: int = 24) -> torch.Tensor:
    return noise(2, model.config.in_channels, height, width).clamp(-1, 1)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-5) -> None:
    """Within the tolerance, relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def latents_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    encoded = model.encode(x)
    return encoded.latent_dist.parameters if "latent_dist" in encoded.keys() else encoded.latents  # noqa: SIM118


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_same_results_from_the_references_folder(case: str, tmp_path: Path) -> None:
    ours, reference = pair(case, tmp_path)
    x = picture(ours)
    latents = latents_of(reference, x)
    close(latents_of(ours, x), latents)
    z = latents[:, : latents.shape[1] // 2] if "KL" in type(ours).__name__ else latents
    close(ours.decode(z).sample, reference.decode(z).sample)
    close(ours.decode(z, return_dict=False)[0], reference.decode(z, return_dict=False)[0])
    close(ours(x).sample, reference(x).sample)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_reference_loads_what_we_write(case: str, tmp_path: Path) -> None:
    ours = CASES[case][0](**CASES[case][1]).eval()
    randomize(ours)
    ours.save_pretrained(tmp_path)
    reference = getattr(diffusers, type(ours).__name__).from_pretrained(tmp_path)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    close(ours(picture(ours)).sample, reference(picture(ours)).sample)
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in reference.config.items() if not k.startswith("_")}
    assert {k: v for k, v in ours.config.items() if not k.startswith("_")} == theirs


@pytest.mark.parametrize("ours", [AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL, VQModel])
def test_signatures_are_the_references(ours: type) -> None:
    for method in ("__init__", "encode", "decode", "forward"):
        mine = inspect.signature(getattr(ours, method)).parameters
        theirs = inspect.signature(getattr(getattr(diffusers, ours.__name__), method)).parameters
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in theirs.values()], method


@pytest.mark.parametrize(
    ("ours", "kwargs"),
    [
        (AutoencoderKL, {"down_block_types": DOWN * 2, "up_block_types": UP * 2, "block_out_channels": (128, 256, 512, 512)}),
        (AutoencoderTiny, {}),
        (
            AsymmetricAutoencoderKL,
            {
                **ASYM,
                "down_block_out_channels": (128, 256, 512, 512),
                "up_block_out_channels": (192, 384, 768, 768),
                "norm_num_groups": 32,
            },
        ),
    ],
)
def test_published_sizes(ours: type, kwargs: dict[str, Any]) -> None:
    kwargs = kwargs if ours is not AutoencoderKL else {**kwargs, "layers_per_block": 2}
    with torch.device("meta"):
        mine, theirs = ours(**kwargs).state_dict(), getattr(diffusers, ours.__name__)(**kwargs).state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


@torch.no_grad()
def test_early_attention_names_load(tmp_path: Path) -> None:
    _, reference = pair("kl", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for new_part, old_part in old.items():
        tensors = {key.replace(new_part, old_part): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    x = picture(reference)
    close(AutoencoderKL.from_pretrained(tmp_path)(x).sample, reference(x).sample)


@pytest.mark.parametrize("size", [(33, 47), (32, 32), (20, 70), (64, 64), (100, 34)])
@torch.no_grad()
def test_kl_tiles(size: tuple[int, int], tmp_path: Path) -> None:
    ours, reference = pair("kl", tmp_path)
    x, z = noise(1, 3, *size).clamp(-1, 1), noise(1, 4, *size)[..., : size[0] // 2 + 1, : size[1] // 2 + 1]
    for model in (ours, reference):
        model.enable_tiling()
    close(latents_of(ours, x), latents_of(reference, x))
    close(ours.decode(z).sample, reference.decode(z).sample)
    close(ours.tiled_encode(x).latent_dist.mean, reference.tiled_encode(x).latent_dist.mean)
    close(ours.tiled_decode(z).sample, reference.tiled_decode(z).sample)
    ours.disable_tiling()
    reference.disable_tiling()
    close(ours.decode(z).sample, reference.decode(z).sample)


@pytest.mark.parametrize("size", [(160, 136), (128, 128), (112, 240), (120, 232)])
@torch.no_grad()
def test_tiny_tiles(size: tuple[int, int], tmp_path: Path) -> None:
    ours, reference = pair("tiny", tmp_path)
    x, z = noise(2, 3, *size).clamp(-1, 1), noise(2, 4, size[0] // 8, size[1] // 8)
    for model in (ours, reference):
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    close(ours.encode(x).latents, reference.encode(x).latents)
    close(ours.decode(z).sample, reference.decode(z).sample)
    odd = x[..., 3:, 5:]
    tiled = ours.encode(odd).latents
    ours.disable_tiling()
    assert tiled.shape == ours.encode(odd).latents.shape


@pytest.mark.parametrize("case", ["kl", "tiny"])
@torch.no_grad()
def test_slicing_changes_nothing(case: str, tmp_path: Path) -> None:
    ours, reference = pair(case, tmp_path)
    x = picture(ours)
    whole = ours(x).sample
    sizes: list[int] = []
    ours.encoder.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[0]))
    ours.enable_slicing()
    reference.enable_slicing()
    close(ours(x).sample, whole)
    close(ours(x).sample, reference(x).sample)
    assert sizes == [1, 1, 1, 1]


@torch.no_grad()
def test_tiny_latent_scaling(tmp_path: Path) -> None:
    ours, reference = pair("tiny", tmp_path)
    raw = torch.linspace(-5, 5, 21)
    close(ours.scale_latents(raw), reference.scale_latents(raw), 0)
    close(ours.unscale_latents(raw), reference.unscale_latents(raw), 0)


@pytest.mark.parametrize("shape", [(1, 1, 32, 40), (2, 1, 32, 40)])
@torch.no_grad()
def test_asymmetric_keeps_what_the_mask_leaves(shape: tuple[int, ...], tmp_path: Path) -> None:
    ours, reference = pair("asymmetric", tmp_path)
    x = picture(ours, 32, 40)
    mask = (noise(*shape, seed=5) > 0).float()
    close(ours(x, mask=mask).sample, reference(x, mask=mask).sample)
    z = noise(2, 4, 4, 5)
    close(ours.decode(z, image=x, mask=mask).sample, reference.decode(z, image=x, mask=mask).sample)
    close(ours.decode(z, image=x).sample, ours.decode(z).sample, 0)
    with pytest.raises(ValueError, match="image must be the decoded size"):
        ours.decode(z, image=x[..., :16], mask=mask[..., :16])


@torch.no_grad()
def test_drawn_latents_are_the_references(tmp_path: Path) -> None:
    ours, reference = pair("kl", tmp_path)
    x = picture(ours)
    results = [m(x, sample_posterior=True, generator=torch.Generator().manual_seed(7)).sample for m in (ours, reference)]
    close(*results)
    generators = [[torch.Generator().manual_seed(seed) for seed in (7, 8)] for _ in range(2)]
    close(*[m.encode(x).latent_dist.sample(g) for m, g in zip((ours, reference), generators, strict=True)])


def test_distribution() -> None:
    parameters, other = noise(2, 8, 3, 4) * 20, noise(2, 8, 3, 4, seed=1)
    ours, reference = DiagonalGaussianDistribution(parameters), ReferenceDistribution(parameters)
    for name in ("mean", "std", "var", "logvar"):
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name))
    assert ours.mode() is ours.mean
    torch.testing.assert_close(ours.kl(), reference.kl())
    torch.testing.assert_close(ours.kl(DiagonalGaussianDistribution(other)), reference.kl(ReferenceDistribution(other)))
    torch.testing.assert_close(ours.nll(other[:, :4]), reference.nll(other[:, :4]))
    fixed = DiagonalGaussianDistribution(parameters, deterministic=True)
    assert fixed.kl().tolist() == fixed.nll(fixed.mean).tolist() == [0.0]
    assert torch.equal(fixed.sample(), fixed.mean)


def test_distribution_is_torchs_normal() -> None:
    parameters = noise(2, 8, 3, 4)
    ours = DiagonalGaussianDistribution(parameters)
    normal = torch.distributions.Normal(ours.mean, ours.std)
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(ours.kl(), torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(ours.nll(parameters[:, 4:]), -normal.log_prob(parameters[:, 4:]).sum(dim=(1, 2, 3)))


@torch.no_grad()
def test_vq_indices_and_losses(tmp_path: Path) -> None:
    ours, reference = pair("vq", tmp_path, lookup_from_codebook=True)
    z = noise(2, 3, 4, 6)
    quantised, loss, indices = ours.quantize(z)
    expected = reference.quantize(z)
    close(quantised, expected[0])
    close(loss, expected[1])
    assert torch.equal(indices, expected[2][2])
    close(ours.decode(z).commit_loss, reference.decode(z).commit_loss)
    plain, lookup = {"force_not_quantize": True}, {"force_not_quantize": True, "shape": (2, 4, 6, 3)}
    close(ours.decode(indices.view(2, 4, 6), **lookup).sample, reference.decode(indices.view(2, 4, 6), **lookup).sample)
    with pytest.raises(ValueError, match="shape"):
        ours.decode(indices, **plain)
    ours.register_to_config(lookup_from_codebook=False)
    close(ours.decode(quantised, **plain).sample, ours.decode(z).sample)
    assert ours.decode(quantised, **plain).commit_loss.tolist() == [0.0, 0.0]


def test_vq_gradients_are_the_references(tmp_path: Path) -> None:
    ours, reference = pair("vq", tmp_path)
    for model in (ours, reference):
        output = model(picture(ours))
        (output.sample.square().mean() + output.commit_loss).backward()
    theirs = dict(reference.named_parameters())
    for name, mine in ours.named_parameters():
        close(mine.grad, theirs[name].grad)


@pytest.mark.parametrize("case", ["kl", "tiny", "asymmetric", "vq_spatial"])
def test_gradient_checkpointing_gives_the_same_gradients(case: str) -> None:
    ours = CASES[case][0](**CASES[case][1])
    randomize(ours)
    x = picture(ours)
    if case == "tiny":
        x, work = noise(2, 4, 2, 3), lambda: ours.decode(x).sample
    else:
        work = lambda: ours(x).sample  # noqa: E731
    gradients = []
    for on in (False, True):
        ours.zero_grad()
        ours.enable_gradient_checkpointing() if on else ours.disable_gradient_checkpointing()
        work().square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["kl", "tiny", "vq_spatial", "asymmetric"])
@torch.no_grad()
def test_compiles_without_a_graph_break(case: str, backend: str) -> None:
    ours = CASES[case][0](**CASES[case][1]).eval()
    randomize(ours)
    x = picture(ours)

    def work(x: torch.Tensor) -> torch.Tensor:
        encoded = ours.encode(x, return_dict=False)[0]
        return ours.decode(encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded).sample

    torch.compiler.reset()
    close(torch.compile(work, backend=backend, fullgraph=True)(x), work(x))


@pytest.mark.parametrize("case", ["kl", "tiny", "vq"])
@torch.no_grad()
def test_half_precision_and_channels_last(case: str) -> None:
    ours = CASES[case][0](**CASES[case][1]).eval()
    randomize(ours)
    x = picture(ours)
    expected = ours(x).sample
    close(ours.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).sample, expected)
    ours.to(torch.bfloat16)
    assert ours(x.bfloat16()).sample.dtype == torch.bfloat16


def test_bad_input_is_named() -> None:
    model = AutoencoderKL(**KL)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8, 8\), expected \(B, 3, H, W\)"):
        model.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"z has shape \(1, 3, 8, 8\), expected \(B, 4, H, W\)"):
        model.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="x is a list"):
        model.encode([1])
    with pytest.raises(ValueError, match="'UpBlock2D': expected UpDecoderBlock2D"):
        AutoencoderKL(up_block_types=("UpBlock2D",))
    with pytest.raises(ValueError, match="2 blocks for 1 widths"):
        AutoencoderKL(down_block_types=DOWN)
    with pytest.raises(ValueError, match="norm_type='batch'"):
        VQModel(norm_type="batch")
    with pytest.raises(ValueError, match="equal widths"):
        AutoencoderTiny(encoder_block_out_channels=(4, 8, 8, 8))
