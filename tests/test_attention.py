"""The attention layer against the reference's, with the reference's weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention as ReferenceAttention
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

from sfumato.models.layers.attention import Attention, additive_mask, attend, upgrade_attention_names

PIXELS, TOKENS, CONTEXT = (2, 32, 4, 5), (2, 20, 32), (2, 7, 24)
GROUP_NORM = {"norm_num_groups": 4, "bias": True, "eps": 1e-6, "residual_connection": True, "rescale_output_factor": 1.3}


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(kwargs: dict, reference_kwargs: dict | None = None) -> tuple[Attention, ReferenceAttention]:
    ours = Attention(32, heads=2, dim_head=16, **kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    reference = ReferenceAttention(32, heads=2, dim_head=16, **(kwargs if reference_kwargs is None else reference_kwargs)).eval()
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.mark.parametrize("kwargs", [{}, GROUP_NORM, {"bias": True}], ids=["plain", "group_norm", "bias"])
@pytest.mark.parametrize("shape", [PIXELS, TOKENS], ids=["pixels", "tokens"])
@torch.no_grad()
def test_self_attention(kwargs: dict, shape: tuple[int, ...]) -> None:
    ours, reference = pair(kwargs)
    torch.testing.assert_close(ours(noise(shape)), reference(noise(shape)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_channels_last_pixels_stay_channels_last() -> None:
    ours, reference = pair(GROUP_NORM)
    x = noise(PIXELS).to(memory_format=torch.channels_last)
    result = ours(x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, reference(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cross_attention(norm: str | None, masked: bool) -> None:
    ours, reference = pair({"cross_attention_dim": 24, "cross_attention_norm": norm, "cross_attention_norm_num_groups": 4})
    mask = additive_mask(torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]), torch.float32) if masked else None
    x, context = noise(TOKENS), noise(CONTEXT, 2)
    torch.testing.assert_close(ours(x, context, mask), reference(x, context, mask), rtol=0, atol=1e-6)


# the reference's layer_norm is as wide as the input, so there it cannot be used on wider or narrower added tokens
@pytest.mark.parametrize(
    ("only_cross", "norm"), [(False, None), (True, None), (False, "group_norm"), (True, "group_norm"), (True, "layer_norm")]
)
@torch.no_grad()
def test_added_keys(only_cross: bool, norm: str | None) -> None:
    kwargs = {"added_kv_proj_dim": 24, "norm_num_groups": 4, "bias": True, "only_cross_attention": only_cross}
    kwargs |= {"cross_attention_norm": norm, "cross_attention_norm_num_groups": 4}
    reference_kwargs = {**kwargs, "processor": AttnAddedKVProcessor2_0()}
    if norm == "layer_norm":
        reference_kwargs["cross_attention_dim"] = 24
    ours, reference = pair({**kwargs, "residual_connection": True}, reference_kwargs)
    x, context = noise(PIXELS), noise(CONTEXT, 2)
    torch.testing.assert_close(ours(x, context), reference(x, context), rtol=0, atol=1e-6)


@pytest.mark.parametrize("boolean", [False, True])
@torch.no_grad()
def test_a_mask_hides_added_keys(boolean: bool) -> None:
    ours, _ = pair({"added_kv_proj_dim": 24, "norm_num_groups": 4, "bias": True, "residual_connection": True})
    x, context = noise(PIXELS), noise(CONTEXT, 2)
    keep = torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)
    mask = keep.bool().unsqueeze(1) if boolean else additive_mask(keep, torch.float32)
    torch.testing.assert_close(ours(x, context, mask), ours(x, context[:, :3]))


@torch.no_grad()
def test_attend_is_the_formula() -> None:
    q, k, v = noise((2, 5, 8), 1), noise((2, 7, 8), 2), noise((2, 7, 8), 3)
    expected = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / 2.0, dim=-1)  # sqrt(4) = 2
        expected.append(weights @ v[..., head])
    torch.testing.assert_close(attend(q, k, v, heads=2), torch.cat(expected, dim=-1))


def test_old_names() -> None:
    names = ["a.query.weight", "a.key.bias", "a.value.weight", "a.proj_attn.bias", "a.group_norm.weight"]
    renamed = upgrade_attention_names(dict.fromkeys(names, torch.zeros(1)))
    assert list(renamed) == ["a.to_q.weight", "a.to_k.bias", "a.to_v.weight", "a.to_out.0.bias", "a.group_norm.weight"]


def test_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="layer_norm"):
        Attention(32, cross_attention_norm="rms")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        additive_mask(torch.ones(3), torch.float32)
