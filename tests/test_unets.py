"""The two-dimensional U-Nets against the reference's: outputs, state dictionaries, and what a user can get wrong."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tiny import noise, randomize
from unet_configs import CONDITIONED, PLAIN, PUBLISHED, TINY, UNCONDITIONED

from sfumato.errors import ConfigError
from sfumato.models.layers import compute
from sfumato.models.layers.compute import Conv2d
from sfumato.models.unets.unet_2d import UNet2DModel
from sfumato.models.unets.unet_2d_condition import UNet2DConditionModel


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        mine, theirs = UNet2DConditionModel(**PUBLISHED[name]), diffusers.UNet2DConditionModel(**PUBLISHED[name])
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in mine.state_dict().items()} == expected
    assert mine.num_parameters() == theirs.num_parameters()


def both(name: str) -> tuple[Any, Any]:
    """Our network and the reference's with the same weights."""
    mine, theirs = ours(name), reference(name)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


@pytest.mark.parametrize("name", ["sd15", "sdxl", "deepfloyd", "ddpm", "ncsnpp"])
@pytest.mark.parametrize("timestep", [7.5, torch.tensor(7), torch.tensor([7]), torch.tensor([3.0, 900.0])], ids=str)
@torch.no_grad()
def test_timesteps_of_every_form(name: str, timestep: Any) -> None:
    mine, theirs = both(name)
    arguments = {**inputs(theirs.config), "timestep": timestep}
    result = mine(**arguments).sample
    if name in UNCONDITIONED and isinstance(timestep, float):  # there the reference cuts the fraction off
        arguments["timestep"] = torch.tensor(timestep)
    assert_same(result, theirs(**arguments).sample)


@torch.no_grad()
def test_a_batch_is_its_samples() -> None:
    model = ours("sd15")
    x, context, times = noise(2, 4, 16, 16), noise(2, 5, 24), torch.tensor([3, 900])
    together = model(x, times, context).sample
    for i in range(2):
        assert_same(model(x[i : i + 1], int(times[i]), context[i : i + 1]).sample, together[i : i + 1])


@pytest.mark.parametrize("name", ["sd15", "latent upscaler", "deepfloyd", "x4 upscaler"])
@torch.no_grad()
def test_encoder_attention_mask(name: str) -> None:
    mine, theirs = both(name)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    arguments = {**inputs(theirs.config), "encoder_attention_mask": keep}
    result = mine(**arguments).sample
    assert_same(result, theirs(**arguments).sample)
    assert_same(mine(**{**arguments, "encoder_attention_mask": keep.bool()}).sample, result)


@torch.no_grad()
def test_attention_mask() -> None:
    one_level = {
        **TINY,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    mine, theirs = randomize(UNet2DConditionModel(**one_level)), randomize(diffusers.UNet2DConditionModel(**one_level))
    keep = torch.ones(2, 16, dtype=torch.long)
    keep[1, 5:] = 0
    mine.load_state_dict(theirs.state_dict())
    arguments = {**inputs(theirs.config, size=4), "attention_mask": keep}
    assert_same(mine(**arguments).sample, theirs(**arguments).sample)
    mine, theirs = both("deepfloyd")
    arguments = {**inputs(theirs.config), "attention_mask": keep[:, :5]}
    assert_same(mine(**arguments).sample, theirs(**arguments).sample)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "three levels"])
@torch.no_grad()
def test_residuals_of_adapters(name: str) -> None:
    mine, theirs = both(name)
    arguments = inputs(theirs.config)
    shapes: list[Any] = []
    handle = theirs.conv_in.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    handles = [
        b.register_forward_hook(lambda module, args, out: shapes.extend(s.shape for s in out[1])) for b in theirs.down_blocks
    ]
    expected = theirs(**arguments).sample
    for h in (handle, *handles):
        h.remove()
    control = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    arguments |= {"down_block_additional_residuals": control, "mid_block_additional_residual": control[-1]}
    result = mine(**arguments).sample
    assert_same(result, theirs(**arguments).sample)
    assert not torch.allclose(result, expected)
    with pytest.raises(ValueError, match="down_block_additional_residuals"):
        mine(**{**arguments, "down_block_additional_residuals": control[1:]})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "three levels"])
@torch.no_grad()
def test_residuals_within_down_blocks(name: str) -> None:
    mine, theirs = both(name)
    arguments = inputs(theirs.config)
    sizes = [16 >> i for i in range(len(theirs.config.block_out_channels))]
    adapter = []
    for i, (kind, width) in enumerate(zip(theirs.config.down_block_types, theirs.config.block_out_channels, strict=True)):
        halved = kind == "DownBlock2D" and i < len(sizes) - 1
        size = sizes[i] // 2 if halved else sizes[i]
        adapter.append(noise(2, width, size, size, seed=i))
    result = mine(**arguments, down_intrablock_additional_residuals=list(adapter)).sample
    assert_same(result, theirs(**arguments, down_intrablock_additional_residuals=list(adapter)).sample)
    with pytest.raises(ValueError, match="down_intrablock_additional_residuals"):
        mine(**arguments, down_intrablock_additional_residuals=adapter[1:])


@pytest.mark.parametrize("name", ["three levels", "ddpm"])
@pytest.mark.parametrize("size", [(18, 13), (17, 15)])
@torch.no_grad()
def test_sizes_that_do_not_halve_evenly(name: str, size: tuple[int, int]) -> None:
    mine, theirs = both(name)
    arguments = {**inputs(theirs.config), "sample": noise(2, theirs.config.in_channels, *size)}
    result = mine(**arguments).sample
    assert result.shape[2:] == size
    if name != "ddpm":  # the reference cannot do this here
        assert_same(result, theirs(**arguments).sample)


@pytest.mark.parametrize("name", ["sd15", "deepfloyd", "latent upscaler", "ddpm", "ncsnpp"])
@torch.no_grad()
def test_channels_last_and_bfloat16(name: str) -> None:
    model = ours(name)
    arguments = inputs(model.config)
    expected = model(**arguments).sample
    model = model.to(memory_format=torch.channels_last)
    arguments["sample"] = arguments["sample"].to(memory_format=torch.channels_last)
    assert_same(model(**arguments).sample, expected)

    def half(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: half(v) for k, v in value.items()}
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 else value

    result = model.bfloat16()(**half(arguments)).sample
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["sd15", "deepfloyd", "latent upscaler", "ddpm", "ncsnpp"])
def test_gradients(name: str) -> None:
    mine, theirs = both(name)
    arguments = inputs(theirs.config)
    theirs(**arguments).sample.square().mean().backward()
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    for checkpointing in (False, True):
        mine.zero_grad()
        if checkpointing:
            mine.enable_gradient_checkpointing()
        mine(**arguments).sample.square().mean().backward()
        found = {key: p.grad for key, p in mine.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=1e-5 + 1e-4 * float(grad.abs().max()), msg=key)


@pytest.mark.parametrize("name", ["sdxl", "deepfloyd", "latent upscaler", "ddpm", "ncsnpp"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name: str) -> None:
    model = ours(name)
    arguments = inputs(model.config)
    expected = model(**arguments).sample
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(**arguments, return_dict=False)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_compiles_by_inductor(name: str) -> None:
    model = ours(name)
    arguments = inputs(model.config)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)(**arguments).sample
    torch.testing.assert_close(compiled, model(**arguments).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_do_not_disturb_each_other() -> None:
    model = ours("sd15")
    calls = [
        {"sample": noise(1, 4, 16, 16, seed=i), "timestep": 100 * i, "encoder_hidden_states": noise(1, 5, 24, seed=i)}
        for i in range(4)
    ]
    expected = [model(**call).sample for call in calls]
    results: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                results[i] = model(**calls[i]).sample

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("CrossAttnDownBlock2d", "DownBlock2D")}, "did you mean 'CrossAttnDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlock2D")}, "up_block_types"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
        ({"block_out_channels": (32, 64, 64)}, "block_out_channels"),
        ({"block_out_channels": (32, 60)}, "norm_num_groups=8"),
        ({"mid_block_type": "UNetMidBlock3D"}, "mid_block_type"),
        ({"layers_per_block": (1,)}, "layers_per_block"),
        ({"attention_head_dim": (8,)}, "attention_head_dim"),
        ({"attention_head_dim": 100}, "attention_head_dim"),
        ({"cross_attention_dim": (24,)}, "cross_attention_dim"),
        ({"only_cross_attention": (True,)}, "only_cross_attention"),
        ({"transformer_layers_per_block": ((1,), (1,))}, "reverse_transformer_layers_per_block"),
        ({"transformer_layers_per_block": ((1, 2), 1), "reverse_transformer_layers_per_block": (1, 1)}, "layers"),
        ({"time_embedding_type": "sine"}, "time_embedding_type"),
        ({"time_embedding_type": "fourier", "time_embedding_dim": 47}, "even"),
        ({"resnet_time_scale_shift": "scale"}, "scale_shift"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"class_embed_type": "learned"}, "class_embed_type"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat"),
        ({"addition_embed_type": "time"}, "text_time"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"addition_embed_type": "image"}, "encoder_hid_dim"),
        ({"encoder_hid_dim_type": "proj"}, "text_proj"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim"),
        ({"num_attention_heads": 4}, "attention_head_dim"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"cross_attention_norm": "rms"}, "layer_norm"),
    ],
)
def test_configurations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet2DConditionModel(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "down_block_types"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"time_embedding_type": "sine"}, "time_embedding_type"),
        ({"downsample_type": "fir"}, "downsample_type"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"in_channels": 4, "down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "in_channels=4"),
    ],
)
def test_unconditional_configurations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet2DModel(**{**PLAIN, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd15", {"sample": noise(2, 3, 16, 16)}, r"\(batch, 4, height, width\)"),
        ("sd15", {"timestep": torch.tensor([1, 2, 3])}, "3 times for a batch of 2"),
        ("sd15", {"class_labels": torch.tensor([1, 2])}, "class_labels"),
        ("x4 upscaler", {"class_labels": None}, "class_labels"),
        ("sd15", {"timestep_cond": noise(2, 10)}, "time_cond_proj_dim"),
        ("sd15", {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ("sd15", {"added_cond_kwargs": {"text_embeds": noise(2, 8)}}, "text_embeds"),
        ("sdxl", {"added_cond_kwargs": {"text_embeds": noise(2, 20)}}, "time_ids"),
        ("deepfloyd", {"sample": noise(2, 3, 18, 18)}, "multiples of 4"),
        ("ddpm", {"class_labels": torch.tensor([1, 2])}, "class_labels"),
    ],
)
def test_arguments_that_cannot_work(name: str, changes: dict[str, Any], message: str) -> None:
    model = ours(name)
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(model.config), **changes})


def test_early_attention_names_load() -> None:
    model = ours("ddpm")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def early(key: str) -> str:
        for new, old in names.items():
            key = key.replace(new, old)
        return key

    tensors = model.state_dict()
    assert UNet2DModel.upgrade_state_dict({early(key): value for key, value in tensors.items()}).keys() == tensors.keys()


@torch.no_grad()
@pytest.mark.parametrize("width", [4, 512])
def test_ordered_weights_follow_every_change(width: int) -> None:
    """A convolution keeps a copy of its weights in the processor's order, which must never be stale nor be saved."""
    conv, x = Conv2d(width, width, 3, padding=1), noise(2, width, 8, 8)

    def check() -> None:
        expected = F.conv2d(x, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert conv._ordered is not None

    check()
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert copy.deepcopy(conv)._ordered is None
    conv.weight.mul_(2)
    check()
    conv.weight.data.mul_(2)
    check()
    conv.weight.data = conv.weight.data + 1
    check()
    down, up = noise(width, 2), noise(2, width, seed=1)  # an adapter merged through `.data`
    conv.weight.data[..., 1, 1].add_(down @ up)
    conv.weight.data[..., 0, 0].add_(down @ up)
    check()
    conv.bfloat16()
    assert conv._ordered is None
    conv.float()
    check()
    conv.load_state_dict({key: noise(*value.shape, seed=2) for key, value in conv.state_dict().items()}, assign=True)
    check()
    conv.to(memory_format=torch.channels_last)
    check()
    with torch.inference_mode():
        check()


def test_ordered_weights_stay_out_of_the_way() -> None:
    conv, x = Conv2d(512, 512, 3, padding=1), noise(1, 512, 4, 4)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        torch.compile(conv, fullgraph=True, backend="eager")(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        assert conv.to("meta")(x.to("meta")).shape == x.shape
    assert conv._ordered is None


@torch.no_grad()
def test_ordered_weights_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sum(compute._kept.values())
    convs, x = [Conv2d(64, 64, 3, padding=1) for _ in range(3)], noise(1, 64, 4, 4)
    monkeypatch.setattr(compute, "ORDERED_LIMIT", kept + 2 * convs[0].weight.nbytes)
    for conv in convs:
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    assert [conv._ordered is not None for conv in convs] == [True, True, False]
    del convs[0], conv
    gc.collect()
    convs[-1](x)
    assert convs[-1]._ordered is not None, "room that a network leaves is used by the next"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_products_and_pointwise_convolutions(dtype: torch.dtype, layout: torch.memory_format) -> None:
    close = {"rtol": 1e-5 if dtype == torch.float32 else 0.02, "atol": 1e-5 if dtype == torch.float32 else 0.01}
    x = noise(2, 256, 16, 16).to(dtype, memory_format=layout)
    for out, bias in ((8, True), (256, True), (256, False)):
        conv, linear = Conv2d(256, out, 1, bias=bias).to(dtype), compute.Linear(256, out, bias=bias).to(dtype)
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias), **close)
        tokens = x.flatten(2).transpose(1, 2)
        torch.testing.assert_close(linear(tokens), F.linear(tokens, linear.weight, linear.bias), **close)
        torch.testing.assert_close(linear(tokens[0]), F.linear(tokens[0], linear.weight, linear.bias), **close)
    with pytest.raises(RuntimeError, match="shape"):
        linear(noise(4096, 255).to(dtype))


@torch.no_grad()
def test_bfloat16_is_no_less_precise_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_lacks_bfloat16", lambda: True)
    for layer, x in ((Conv2d(64, 64, 3, padding=1), noise(1, 64, 32, 32)), (compute.Linear(128, 128), noise(512, 128))):
        plain = F.conv2d if isinstance(layer, Conv2d) else F.linear
        layer, x = layer.bfloat16(), x.bfloat16()
        emulated = plain(x, layer.weight, layer.bias, **({"padding": 1} if isinstance(layer, Conv2d) else {}))
        result, exact = layer(x), layer.double()(x.double())
        assert result.dtype == torch.bfloat16
        assert (result - exact).norm() <= 1.05 * (emulated - exact).norm()
