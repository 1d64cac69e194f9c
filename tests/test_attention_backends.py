"""Who computes attention, and callers' own processors."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers.models import attention_processor as theirs
from tiny import noise

import sfumato
from sfumato.models.layers import backends, compute
from sfumato.models.layers.attention import attend
from sfumato.models.layers.processors import AttnProcessor

MASKS = {"none": None, "boolean": noise(2, 1, 5, 7, seed=4) > -0.5, "additive": noise(2, 1, 1, 7, seed=5)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_backends_agree(backend: str, mask: str) -> None:
    query, key, value = noise(2, 5, 32), noise(2, 7, 32, seed=1), noise(2, 7, 32, seed=2)
    expected = attend(query, key, value, 4, MASKS[mask])
    torch.testing.assert_close(attend(query, key, value, 4, MASKS[mask], backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [n for n, b in backends.BACKENDS.items() if not b.masks])
def test_a_backend_that_would_drop_the_mask_refuses(backend: str) -> None:
    x = noise(2, 7, 32).half()
    with pytest.raises(ValueError, match="would drop the attention mask"):
        attend(x, x, x, 4, torch.ones(2, 1, 7, 7, dtype=torch.bool), backend)


def test_limits_are_named() -> None:
    x = noise(2, 7, 32)
    with pytest.raises(ValueError, match=r"takes torch.float16 or torch.bfloat16, not torch.float32"):
        attend(x, x, x, 4, None, "flash")
    with pytest.raises(ValueError, match="takes heads of 64 or 96 or 128, not of 8"):
        attend(x.half(), x.half(), x.half(), 4, None, "sage")
    with pytest.raises(ValueError, match="needs CUDA tensors, not cpu"):
        attend(x.half(), x.half(), x.half(), 4, None, "_native_cudnn")


def unet() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sfumato.UNet2DConditionModel(**{k: v for k, v in tiny.unet().config.items() if not k.startswith("_")}).eval()


INPUTS = (noise(1, 4, 16, 16), 5, noise(1, 7, 32))


def test_a_backend_reaches_every_attention_and_can_be_undone() -> None:
    network = unet()
    with torch.no_grad():
        before = network(*INPUTS).sample
        network.set_attention_backend("_native_math")
        layers = [m for m in network.modules() if hasattr(type(m), "attention_backend")]
        assert layers and {layer.attention_backend for layer in layers} == {"_native_math"}
        torch.testing.assert_close(network(*INPUTS).sample, before, atol=1e-5, rtol=1e-5)
        network.set_attention_backend("native")
        assert torch.equal(network(*INPUTS).sample, before)
    with pytest.raises(ValueError, match=r"'natve' is unknown.*did you mean 'native'"):
        network.set_attention_backend("natve")
    with pytest.raises(ImportError, match="pip install sageattention"):
        network.set_attention_backend("sage")


def test_transformers_have_the_layers_too() -> None:
    config = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8)
    network = sfumato.FluxTransformer2DModel(**config, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), in_channels=8)
    network.set_attention_backend("flex")
    assert sum(getattr(m, "attention_backend", "") == "flex" for m in network.modules()) == 2
    with pytest.raises(ValueError, match="T2IAdapter has no attention, so it takes no processors"):
        sfumato.T2IAdapter().set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("processor", [theirs.AttnProcessor(), theirs.AttnProcessor2_0(), AttnProcessor()])
def test_processors_of_the_field_work(processor: Any) -> None:
    network = unet()
    assert set(network.attn_processors) == set(tiny.unet().attn_processors)
    with torch.no_grad():
        before = network(*INPUTS).sample
        network.set_attn_processor(processor)
        assert all(type(p) is type(processor) for p in network.attn_processors.values())
        torch.testing.assert_close(network(*INPUTS).sample, before, atol=1e-5, rtol=1e-5)


def test_a_processor_of_ones_own_is_called_in_the_chosen_layers() -> None:
    network = unet()
    seen: list[list[str]] = []

    class Spy:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
            seen.append(sorted(more))
            return AttnProcessor()(attn, hidden_states, **more)

    given = {n: Spy() if "attn2" in n else p for n, p in network.attn_processors.items()}
    network.set_attn_processor(given)
    with torch.no_grad():
        network(*INPUTS)
    assert len(seen) == sum("attn2" in n for n in given)
    assert seen[0] == ["attention_mask", "encoder_hidden_states"]
    with pytest.raises(ValueError, match="no attention layer of this network"):
        network.set_attn_processor({**given, "down.attn9.processor": Spy()})
    with pytest.raises(ValueError, match="have no processor"):
        network.set_attn_processor(dict(list(given.items())[:1]))


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_attention_on_a_cpu_is_the_formula(dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_lacks_bfloat16", lambda: emulated)
    monkeypatch.setattr(compute, "MAX_SCORES", 100 * 300)  # several pieces, the last one smaller
    query, key, value = (noise(2, count, 128, seed=seed).to(dtype) for seed, count in enumerate((250, 300, 300)))
    with torch.no_grad():
        found = attend(query, key, value, 2)
        alone = attend(query[1:], key[1:], value[1:], 2)
    heads = [x.double().unflatten(2, (2, 64)).transpose(1, 2) for x in (query, key, value)]
    expected = ((heads[0] @ heads[1].mT / 8).softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    assert found.dtype is dtype and (found - expected).abs().max() < (2e-6 if dtype is torch.float32 else 5e-3)
    assert torch.equal(found[1:], alone)  # whatever the batch


def test_large_attention_on_one_thread_spares_torch_s_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(compute.F, "scaled_dot_product_attention", lambda *args: calls.append(1) or args[0])
    x = noise(1, 260, 64)
    with torch.no_grad():
        attend(x, x, x, 1)
        assert not calls
        attend(x[:, :200], x[:, :200], x[:, :200], 1)  # small
    attend(x, x, x, 1)  # with gradients
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad():
        attend(x, x, x, 1)
    assert len(calls) == 3


@torch.no_grad()
def test_large_attention_compiles_in_one_graph() -> None:
    x = noise(1, 260, 64)
    compiled = torch.compile(lambda y: attend(y, y, y, 1), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attend(x, x, x, 1), atol=1e-5, rtol=1e-5)
