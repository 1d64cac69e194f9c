"""The networks that steer U-Nets against the reference's: ControlNet, its union and XS kinds, T2I-Adapter, several at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel as ReferenceMultiUnion
from test_unets import assert_same, noise, randomize
from unet_configs import CONDITIONED, PUBLISHED, SDXL, TINY

import sfumato
from sfumato.errors import ConfigError, HubError
from sfumato.models.layers.options import AttentionOptions, Perturbation

PICTURES = {"conditioning_embedding_out_channels": (8, 16, 24, 32)}
FOLLOWING = {k: v for k, v in TINY.items() if k != "up_block_types"} | PICTURES
SDXL_FOLLOWING = {**FOLLOWING, **{k: v for k, v in SDXL.items() if k != "up_block_types"}}
CONTROL: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"attention_head_dim": (4, 8), "use_linear_projection": True, "controlnet_conditioning_channel_order": "bgr"},
    "sdxl": SDXL_FOLLOWING,
    "heads": {"num_attention_heads": (2, 4), "conditioning_channels": 5},
    "pooled": {"global_pool_conditions": True},
    "classes": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "pixel attention": {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"), "mid_block_type": "UNetMidBlock2D"},
}
UNION = {**SDXL_FOLLOWING, "num_trans_channel": 32, "num_proj_channel": 32, "num_control_type": 5, "num_trans_head": 4}
XS: dict[str, dict[str, Any]] = {
    "sd": {"num_attention_heads": 2, "ctrl_conditioning_channel_order": "bgr"},
    "mixed times": {"num_attention_heads": 2, "ctrl_learn_time_embedding": True, "time_embedding_mix": 0.4},
    "sdxl": {**{k: v for k, v in SDXL.items() if k != "attention_head_dim"}, "num_attention_heads": (4, 8)},
}
XS_BASE = {
    k: TINY[k] for k in ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups", "cross_attention_dim")
} | {"ctrl_block_out_channels": (8, 20), "ctrl_num_attention_heads": 2, "ctrl_conditioning_embedding_out_channels": (8, 16, 24, 32)}
ADAPTERS: dict[str, dict[str, Any]] = {
    "full_adapter": {"channels": [32, 64, 96, 128]},
    "full_adapter_xl": {"channels": [32, 64, 96, 96], "downscale_factor": 16, "num_res_blocks": 1},
    "light_adapter": {"channels": [32, 64, 96], "in_channels": 1},
}
SIZE = (8, 12)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """Our network of this name and the reference's, with the same weights, none of them zero."""
    theirs, mine = randomize(getattr(diffusers, name)(**config)), getattr(sfumato, name)(**config).eval()
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in mine.state_dict().items()} == shapes
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def start(config: Any, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """The arguments that a network takes as its U-Net does, for a configuration."""
    arguments: dict[str, Any] = {"sample": noise(2, 4, *size), "timestep": torch.tensor([7, 900])}
    arguments["encoder_hidden_states"] = noise(2, 5, 24, seed=4)
    if config.get("class_embed_type") == "projection":
        arguments["class_labels"] = noise(2, 10, seed=3)
    if config.get("time_cond_proj_dim"):
        arguments["timestep_cond"] = noise(2, 10, seed=5)
    if config.get("addition_embed_type"):
        arguments["added_cond_kwargs"] = {"text_embeds": noise(2, 20, seed=6), "time_ids": torch.arange(12).reshape(2, 6) * 10}
    return arguments


def picture(channels: int = 3, seed: int = 8, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return noise(2, channels, 8 * size[0], 8 * size[1], seed=seed)


def residuals(output: Any) -> list[torch.Tensor]:
    down, middle = output if isinstance(output, tuple) else output.to_tuple()
    return [*down, middle]


def assert_all_same(mine: Any, theirs: Any) -> None:
    for a, b in zip(residuals(mine), residuals(theirs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", CONTROL)
@torch.no_grad()
def test_controlnet_equals_the_reference(name: str, tmp_path: Path) -> None:
    mine, theirs = pair("ControlNetModel", {**FOLLOWING, **CONTROL[name]})
    arguments = start(mine.config) | {"controlnet_cond": picture(mine.config.conditioning_channels)}
    for options in ({}, {"conditioning_scale": 0.4}, {"guess_mode": True, "conditioning_scale": 0.5}, {"return_dict": False}):
        assert_all_same(mine(**arguments, **options), theirs(**arguments, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = sfumato.ControlNetModel.from_pretrained(tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(residuals(again(**arguments)), residuals(theirs(**arguments)), strict=True))


@pytest.mark.parametrize("size", [(9, 11), (4, 16)], ids=str)
@torch.no_grad()
def test_controlnet_takes_any_size(size: tuple[int, int]) -> None:
    mine, theirs = pair("ControlNetModel", FOLLOWING)
    arguments = start(mine.config, size) | {"controlnet_cond": picture(size=size)}
    assert_all_same(mine(**arguments), theirs(**arguments))


@torch.no_grad()
def test_attention_mask_reaches_the_picture() -> None:
    one_level = {**FOLLOWING, "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)}
    mine, theirs = pair("ControlNetModel", one_level)
    keep = torch.ones(2, 16, dtype=torch.long)
    keep[1, 5:] = 0
    arguments = start(mine.config, (4, 4)) | {"controlnet_cond": picture(size=(4, 4)), "attention_mask": keep}
    assert_all_same(mine(**arguments), theirs(**arguments))


@torch.no_grad()
def test_options_of_attention_reach_controlnets() -> None:
    mine, _ = pair("ControlNetModel", FOLLOWING)
    arguments = start(mine.config) | {"controlnet_cond": picture()}
    layer = mine.mid_block.attentions[0].transformer_blocks[0].attn1
    weaker = AttentionOptions(perturbation=Perturbation("identity", frozenset([layer])))
    plain, changed = (residuals(mine(**arguments, cross_attention_kwargs=o)) for o in (None, weaker))
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], changed[:-1], strict=True))
    assert not torch.allclose(plain[-1], changed[-1])
    with pytest.raises(ValueError, match=r"cross_attention_kwargs=.*scale adapters where"):
        mine(**arguments, cross_attention_kwargs={"scale": 0.5})


FOLLOWED = {"sd15": {}, "sdxl": SDXL, "classes": CONDITIONED["classes projected"], "upscaler": CONDITIONED["x4 upscaler"]}


@pytest.mark.parametrize("name", FOLLOWED)
@torch.no_grad()
def test_a_network_from_a_unet_starts_as_the_references(name: str) -> None:
    mine = randomize(sfumato.UNet2DConditionModel(**{**TINY, **FOLLOWED[name]}))
    theirs = diffusers.UNet2DConditionModel(**{**TINY, **FOLLOWED[name]})
    theirs.load_state_dict(mine.state_dict())
    ours, reference = sfumato.ControlNetModel.from_unet(mine), diffusers.ControlNetModel.from_unet(theirs)
    copied = {k for k, v in reference.state_dict().items() if k in mine.state_dict() and torch.equal(v, mine.state_dict()[k])}
    assert copied == {k for k, v in ours.state_dict().items() if k in mine.state_dict() and torch.equal(v, mine.state_dict()[k])}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in reference.config.items() if not k.startswith("_")}
    assert {k: ours.config[k] for k in plain} == plain
    other = sfumato.ControlNetModel.from_unet(mine, load_weights_from_unet=False)
    assert not torch.equal(other.conv_in.weight, mine.conv_in.weight)


@pytest.mark.parametrize("name", ["ControlNetModel", "ControlNetUnionModel"])
@torch.no_grad()
def test_a_fresh_network_changes_nothing(name: str) -> None:
    one_level = {"block_out_channels": (320,), "attention_head_dim": 8, "transformer_layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = randomize(sfumato.UNet2DConditionModel(**{**TINY, **SDXL, **one_level, **blocks}))
    network = getattr(sfumato, name).from_unet(unet, conditioning_embedding_out_channels=(8, 16, 24, 32))
    own = ("control", "task_embedding", "transformer_layes", "spatial_ch_projs")
    followed = {key: value for key, value in network.state_dict().items() if not key.startswith(own)}
    assert followed and all(torch.equal(value, unet.state_dict()[key]) for key, value in followed.items())
    network.controlnet_cond_embedding.conv_out.weight.fill_(0.1)  # so that the picture is heard
    arguments = start(network.config) | {"controlnet_cond": picture()}
    if name == "ControlNetUnionModel":
        arguments |= {"controlnet_cond": [picture()], "control_type": torch.eye(6)[[1, 1]], "control_type_idx": [1]}
    found = residuals(network(**arguments))
    assert len(found) == 3 and all(not residual.any() for residual in found)
    network.controlnet_mid_block.weight.fill_(0.1)
    assert residuals(network(**arguments))[-1].any()


@pytest.mark.parametrize("name", ["lcm", "classes concatenated", "only cross attention", "uneven layers"])
def test_a_unet_that_cannot_be_followed_is_refused(name: str) -> None:
    unet = sfumato.UNet2DConditionModel(**{**TINY, **CONDITIONED[name]})
    if name in ("lcm", "classes concatenated"):
        with pytest.raises(ConfigError, match="cannot be followed: it must be"):
            sfumato.ControlNetModel.from_unet(unet)
    with pytest.raises(ConfigError, match="cannot be followed: it must be"):
        sfumato.ControlNetXSAdapter.from_unet(unet, size_ratio=0.25)


def union_arguments(config: Any, same: bool = True) -> dict[str, Any]:
    """Two pictures, of the kinds 1 and 3; ``same``: in all of the batch."""
    pictures = [picture(seed=8), picture(seed=9)]
    if same:
        pictures = [p[:1].expand_as(p) for p in pictures]
    kinds = torch.tensor([[0.0, 1, 0, 1, 0]]).expand(2, -1)
    return start(config) | {"controlnet_cond": pictures, "control_type": kinds, "control_type_idx": [1, 3]}


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_union_equals_the_reference(layers: int, tmp_path: Path) -> None:
    mine, theirs = pair("ControlNetUnionModel", {**UNION, "num_trans_layer": layers})
    arguments = union_arguments(mine.config)
    for options in (
        {}, {"conditioning_scale": 0.5}, {"conditioning_scale": [0.5, 0.7]}, {"guess_mode": True, "conditioning_scale": 0.5},
        {"from_multi": True, "conditioning_scale": 0.5}, {"from_multi": True, "guess_mode": True, "return_dict": False},
    ):  # fmt: skip
        assert_all_same(mine(**arguments, **options), theirs(**arguments, **options))
    one = {**arguments, "controlnet_cond": [picture()[:1].expand(2, -1, -1, -1)], "control_type_idx": [2]}
    for scale in (1.0, 0.6, [0.6]):
        assert_all_same(mine(**one, conditioning_scale=scale), theirs(**one, conditioning_scale=scale))
    mine.save_pretrained(tmp_path)
    assert_all_same(diffusers.ControlNetUnionModel.from_pretrained(tmp_path)(**arguments), theirs(**arguments))


@torch.no_grad()
def test_pictures_of_a_batch_do_not_leak_into_each_other() -> None:
    """Each sample is what the reference makes of it alone; in a batch its pictures attend to each other."""
    mine, theirs = pair("ControlNetUnionModel", UNION)
    arguments = union_arguments(mine.config, same=False)
    together = residuals(mine(**arguments))
    for i in range(2):

        def take(value: Any, i: int = i) -> Any:
            if isinstance(value, dict):
                return {key: take(item) for key, item in value.items()}
            if isinstance(value, list):
                return [take(item) for item in value]
            return value[i : i + 1] if isinstance(value, torch.Tensor) else value

        for a, b in zip(together, residuals(theirs(**{k: take(v) for k, v in arguments.items()})), strict=True):
            assert_same(a[i : i + 1], b)


@torch.no_grad()
def test_several_controlnets_add_up(tmp_path: Path) -> None:
    (one, first), (two, second) = pair("ControlNetModel", FOLLOWING), pair("ControlNetModel", FOLLOWING)
    for network in (two, second):
        network.controlnet_mid_block.weight.mul_(-1)
    mine, theirs = sfumato.MultiControlNetModel([one, two]), diffusers.MultiControlNetModel([first, second])
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    arguments = start(one.config) | {"controlnet_cond": [picture(seed=8), picture(seed=9)], "conditioning_scale": [0.3, 0.8]}
    arguments["return_dict"] = False  # with it the reference answers names
    assert_all_same(mine(**arguments), theirs(**arguments))
    assert_all_same(mine(**arguments, guess_mode=True), theirs(**arguments, guess_mode=True))
    weights = torch.tensor([0.3, 0.8])
    assert_all_same(mine(**{**arguments, "conditioning_scale": weights}), theirs(**arguments))
    mine.save_pretrained(tmp_path / "ours" / "controlnet")
    theirs.save_pretrained(str(tmp_path / "theirs" / "controlnet"))
    saved = [sorted(p.name for p in (tmp_path / side).iterdir()) for side in ("ours", "theirs")]
    assert saved[0] == saved[1] == ["controlnet", "controlnet_1"]
    assert_all_same(
        diffusers.MultiControlNetModel.from_pretrained(str(tmp_path / "ours" / "controlnet"))(**arguments), theirs(**arguments)
    )
    loaded = sfumato.MultiControlNetModel.from_pretrained(tmp_path / "theirs", subfolder="controlnet", dtype=torch.float64)
    assert loaded.dtype == torch.float64 and len(loaded.members) == 2 and not loaded.training
    with pytest.raises(FileExistsError, match="controlnet_1 exists"):
        sfumato.MultiControlNetModel([one]).save_pretrained(tmp_path / "ours" / "controlnet")


@torch.no_grad()
def test_several_unions_add_up() -> None:
    (one, first), (two, second) = pair("ControlNetUnionModel", UNION), pair("ControlNetUnionModel", UNION)
    for network in (two, second):
        network.controlnet_mid_block.weight.mul_(-1)
    arguments = union_arguments(one.config)
    arguments["controlnet_cond"] = [arguments["controlnet_cond"], arguments["controlnet_cond"][:1]]
    arguments["control_type"] = [arguments["control_type"], torch.eye(5)[[2, 2]]]
    arguments["control_type_idx"] = [[1, 3], [2]]
    arguments |= {"conditioning_scale": [0.3, 0.8], "return_dict": False}
    mine, theirs = sfumato.MultiControlNetUnionModel([one, two]), ReferenceMultiUnion([first, second])
    assert_all_same(mine(**arguments), theirs(**arguments))
    assert_all_same(mine(**arguments, guess_mode=True), theirs(**arguments, guess_mode=True))


@pytest.mark.parametrize("name", XS)
@torch.no_grad()
def test_controlnet_xs_equals_the_reference(name: str, tmp_path: Path) -> None:
    mine, theirs = pair("UNetControlNetXSModel", {**XS_BASE, **XS[name]})
    arguments = start(mine.config) | {"controlnet_cond": picture()}
    for options in ({}, {"conditioning_scale": 0.4}, {"apply_control": False}):
        assert_same(mine(**arguments, **options).sample, theirs(**arguments, **options).sample)
    assert_same(mine(**arguments, return_dict=False)[0], theirs(**arguments).sample)
    for network in (mine, theirs):
        network.freeze_unet_params()
    trained = [{n for n, p in network.named_parameters() if p.requires_grad} for network in (mine, theirs)]
    assert trained[0] == trained[1]
    mine.save_pretrained(tmp_path)
    assert_same(diffusers.UNetControlNetXSModel.from_pretrained(tmp_path)(**arguments).sample, theirs(**arguments).sample)


def assert_near(steered: torch.Tensor, alone: torch.Tensor) -> None:
    """The joined network's normalisations have another epsilon than the U-Net's, as in the reference."""
    torch.testing.assert_close(steered, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("widths", [{"size_ratio": 0.75}, {"block_out_channels": [8, 24], "num_attention_heads": [2, 3]}], ids=str)
@torch.no_grad()
def test_controlnet_xs_joins_a_unet(widths: dict[str, Any], tmp_path: Path) -> None:
    config = {**TINY, "block_out_channels": (32, 32), "layers_per_block": 2, "use_linear_projection": True}
    unet = randomize(sfumato.UNet2DConditionModel(**config))
    reference = diffusers.UNet2DConditionModel(**config).eval()
    reference.load_state_dict(unet.state_dict())
    options = {"learn_time_embedding": True, "time_embedding_mix": 0.7, "conditioning_embedding_out_channels": (8, 16, 24, 32)}
    theirs = randomize(diffusers.ControlNetXSAdapter.from_unet(reference, **widths, **options))
    theirs.save_pretrained(tmp_path)
    adapter = sfumato.ControlNetXSAdapter.from_pretrained(tmp_path)
    built = sfumato.ControlNetXSAdapter.from_unet(unet, **widths, **options)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert built.config.num_attention_heads == theirs.config.num_attention_heads
    mine = sfumato.UNetControlNetXSModel.from_unet(unet, adapter).eval()
    joined = diffusers.UNetControlNetXSModel.from_unet(reference, theirs).eval()
    arguments = start(unet.config) | {"controlnet_cond": picture()}
    assert_same(mine(**arguments).sample, joined(**arguments).sample)
    alone = unet(**start(unet.config)).sample
    assert_near(mine(**arguments, apply_control=False).sample, alone)
    uneven = start(unet.config, size=(9, 11))
    assert_near(mine(**uneven, apply_control=False).sample, unet(**uneven).sample)
    assert mine(**uneven, controlnet_cond=picture(size=(9, 11))).sample.isfinite().all()
    fresh = sfumato.UNetControlNetXSModel.from_unet(unet, size_ratio=0.5).eval()
    assert_near(fresh(**arguments).sample, alone)
    with pytest.raises(ValueError, match="size_ratio would be ignored"):
        sfumato.UNetControlNetXSModel.from_unet(unet, adapter, size_ratio=0.5)
    with pytest.raises(ValueError, match="pass exactly one"):
        sfumato.ControlNetXSAdapter.from_unet(unet)
    with pytest.raises(ConfigError, match="was made for a U-Net with block_out_channels"):
        wider = sfumato.UNet2DConditionModel(**{**config, "block_out_channels": (32, 64)})
        sfumato.UNetControlNetXSModel.from_unet(wider, adapter)
    with pytest.raises(ValueError, match="cannot run by itself"):
        adapter(arguments["sample"])


@torch.no_grad()
def test_controlnet_xs_hears_the_condition_of_the_time() -> None:
    unet = randomize(sfumato.UNet2DConditionModel(**{**TINY, "layers_per_block": 2, "time_cond_proj_dim": 10}))
    options = {"learn_time_embedding": True, "time_embedding_mix": 0.0}
    steered = sfumato.UNetControlNetXSModel.from_unet(unet, size_ratio=0.5, ctrl_optional_kwargs=options).eval()
    arguments = start(unet.config)
    assert_near(steered(**arguments, controlnet_cond=picture()).sample, unet(**arguments).sample)
    del arguments["timestep_cond"]
    assert not torch.allclose(steered(**arguments, controlnet_cond=picture()).sample, unet(**start(unet.config)).sample)


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_t2i_adapter_equals_the_reference(name: str, tmp_path: Path) -> None:
    mine, theirs = pair("T2IAdapter", {**ADAPTERS[name], "adapter_type": name})
    factor = mine.downscale_factor
    assert (factor, mine.total_downscale_factor) == (theirs.downscale_factor, theirs.total_downscale_factor)
    for height, width in ((4, 8), (5, 3)):
        x = noise(2, mine.config.in_channels, factor * height, factor * width)
        for a, b in zip(mine(x), theirs(x), strict=True):
            assert_same(a, b)
    mine.save_pretrained(tmp_path)
    assert_same(diffusers.T2IAdapter.from_pretrained(tmp_path)(x)[-1], mine(x)[-1])


@torch.no_grad()
def test_several_t2i_adapters_add_up(tmp_path: Path) -> None:
    config = ADAPTERS["full_adapter"]
    (one, first), (two, second) = pair("T2IAdapter", config), pair("T2IAdapter", config)
    for network in (two, second):
        network.adapter.conv_in.weight.mul_(-1)
    mine, theirs = sfumato.MultiAdapter([one, two]), diffusers.MultiAdapter([first, second])
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert mine.total_downscale_factor == theirs.total_downscale_factor
    xs = [noise(2, 3, 64, 32, seed=seed) for seed in (1, 2)]
    for weights in (None, [0.3, 0.8]):
        for a, b in zip(mine(xs, weights), theirs(xs, weights), strict=True):
            assert_same(a, b)
    mine.save_pretrained(tmp_path / "adapter")
    assert_same(diffusers.MultiAdapter.from_pretrained(str(tmp_path / "adapter"))(xs)[-1], theirs(xs)[-1])
    assert_same(sfumato.MultiAdapter.from_pretrained(tmp_path / "adapter")(xs)[-1], theirs(xs)[-1])
    with pytest.raises(ConfigError, match="reduce pictures differently"):
        sfumato.MultiAdapter([one, sfumato.T2IAdapter(channels=[32, 64, 96, 128], downscale_factor=16)])


SD_CONTROL = {k: v for k, v in PUBLISHED["SD 1.5"].items() if k != "up_block_types"}
SDXL_CONTROL = {k: v for k, v in PUBLISHED["SDXL base"].items() if k != "up_block_types"}
PUBLISHED_CONTROL: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("ControlNetModel", SD_CONTROL),
    "SD 2.1": ("ControlNetModel", {k: v for k, v in PUBLISHED["SD 2.1"].items() if k != "up_block_types"}),
    "SDXL": ("ControlNetModel", SDXL_CONTROL),
    "SDXL union": ("ControlNetUnionModel", SDXL_CONTROL),
    "SDXL union promax": ("ControlNetUnionModel", {**SDXL_CONTROL, "num_control_type": 8}),
    "XS for SD 2.1": ("ControlNetXSAdapter", {"block_out_channels": (4, 8, 16, 16), "num_attention_heads": 1}),
    "XS for SDXL": (
        "ControlNetXSAdapter",
        {
            "block_out_channels": (32, 64, 128),
            "base_block_out_channels": (320, 640, 1280),
            "down_block_types": SDXL_CONTROL["down_block_types"],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "num_attention_heads": (1, 1, 2),
        },
    ),
    "U-Net with XS": ("UNetControlNetXSModel", {}),
    "T2I-Adapter for SD 1.4": ("T2IAdapter", {"channels": [320, 640, 1280, 1280]}),
    "T2I-Adapter for SD 1.4, sketches": ("T2IAdapter", {"channels": [320, 640, 1280, 1280], "in_channels": 1}),
    "T2I-Adapter for SD 1.4, light": ("T2IAdapter", {"channels": [320, 640, 1280], "adapter_type": "light_adapter"}),
    "T2I-Adapter for SDXL": (
        "T2IAdapter",
        {"channels": [320, 640, 1280, 1280], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_CONTROL)
def test_published_sizes(name: str) -> None:
    cls, config = PUBLISHED_CONTROL[name]
    with torch.device("meta"):
        mine, theirs = getattr(sfumato, cls)(**config), getattr(diffusers, cls)(**config)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert mine.num_parameters() == theirs.num_parameters()


def counted(network: torch.nn.Module) -> tuple[Callable[..., Any], list[int]]:
    """The network compiled as one graph, and a list that grows with every compilation."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(network, backend=backend, fullgraph=True), graphs


def control_call(kind: str) -> tuple[Any, dict[str, Any]]:
    if kind == "union":
        network, _ = pair("ControlNetUnionModel", UNION)
        return network, union_arguments(network.config)
    if kind == "multi":
        nets = [pair("ControlNetModel", FOLLOWING)[0] for _ in range(2)]
        return sfumato.MultiControlNetModel(nets), start(FOLLOWING) | {"controlnet_cond": [picture(), picture(seed=9)]}
    name = "UNetControlNetXSModel" if kind == "xs" else "ControlNetModel"
    network, _ = pair(name, {**XS_BASE, **XS["sdxl"]} if kind == "xs" else {**FOLLOWING, **CONTROL[kind]})
    return network, start(network.config) | {"controlnet_cond": picture()}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "union", "multi", "xs"])
@torch.no_grad()
def test_compiles_as_one_graph_and_a_new_scale_does_not_compile_again(kind: str) -> None:
    network, arguments = control_call(kind)
    compiled, graphs = counted(network)
    for value in (0.3, 0.8, 1.0):
        scale = torch.tensor([value, value] if kind == "multi" else value)
        result, expected = (f(**arguments, conditioning_scale=scale) for f in (compiled, network))
        pairs = zip(*((r.to_tuple() if kind == "xs" else residuals(r)) for r in (result, expected)), strict=True)
        for a, b in pairs:
            assert_same(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
@torch.no_grad()
def test_t2i_adapter_compiles_as_one_graph(kind: str) -> None:
    network, _ = pair("T2IAdapter", {**ADAPTERS[kind], "adapter_type": kind})
    compiled, graphs = counted(network)
    x = noise(2, network.config.in_channels, 64, 32)
    assert_same(compiled(x)[-1], network(x)[-1])
    assert len(graphs) == 1


@torch.no_grad()
def test_a_unet_with_residuals_compiles_as_one_graph() -> None:
    unet = randomize(sfumato.UNet2DConditionModel(**TINY))
    network, _ = pair("ControlNetModel", FOLLOWING)
    compiled, graphs = counted(unet)
    for scale in (0.3, 0.9):
        found = residuals(network(**start(TINY), controlnet_cond=picture(), conditioning_scale=scale))
        added = {"down_block_additional_residuals": found[:-1], "mid_block_additional_residual": found[-1]}
        assert_same(compiled(**start(TINY), **added).sample, unet(**start(TINY), **added).sample)
    assert len(graphs) == 1


def refused_calls() -> dict[str, tuple[dict[str, Any], str]]:
    wide = noise(2, 3, 64, 104)
    return {
        "channels": ({"controlnet_cond": picture(4)}, r"controlnet_cond has shape \(2, 4, 64, 96\).*expected \(2, 3, 64, 96\)"),
        "size": ({"controlnet_cond": wide}, r"controlnet_cond has shape \(2, 3, 64, 104\).*resize the picture to 8 times"),
        "batch": ({"controlnet_cond": noise(3, 3, 64, 96)}, "repeat it for the batch"),
        "sample": ({"sample": noise(2, 5, *SIZE)}, r"sample has shape \(2, 5, 8, 12\), .*expect"),
        "classes": ({"class_labels": torch.tensor([1, 2])}, "class_labels are given"),
        "scale": ({"conditioning_scale": torch.ones(2)}, r"conditioning_scale is a tensor of shape \(2,\): expected one number"),
        "added": ({"added_cond_kwargs": {"time_id": noise(2, 6)}}, "added_cond_kwargs holds 'time_id'"),
    }


@pytest.mark.parametrize("case", refused_calls())
def test_a_call_that_does_not_fit_is_refused(case: str) -> None:
    changes, message = refused_calls()[case]
    network = sfumato.ControlNetModel(**FOLLOWING)
    with pytest.raises(ValueError, match=message):
        network(**{**start(FOLLOWING), "controlnet_cond": picture(), **changes})
    if case == "added":
        return
    steered = sfumato.UNetControlNetXSModel(**XS_BASE, num_attention_heads=2)
    with pytest.raises(ValueError, match=message):
        steered(**{**start(FOLLOWING), "controlnet_cond": picture(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_type_idx": [1]}, "one picture for each kind"),
        ({"control_type_idx": [1, 5]}, "5 is no kind of this network, which has 0 to 4"),
        ({"control_type": torch.eye(4)[:2]}, r"control_type has shape \(2, 4\): expected \(2, 5\)"),
        ({"conditioning_scale": [0.5]}, r"conditioning_scale=\[0.5\]: expected one number, or 2"),
        ({"conditioning_scale": [0.5, 0.5], "from_multi": True}, "with from_multi=True"),
        ({"controlnet_cond": picture()}, "controlnet_cond is a Tensor"),
        ({"controlnet_cond": [picture(), picture(2)]}, r"controlnet_cond\[1\] has shape \(2, 2, 64, 96\)"),
    ],
    ids=str,
)
def test_union_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    network = sfumato.ControlNetUnionModel(**UNION)
    with pytest.raises(ValueError, match=message):
        network(**{**union_arguments(network.config), **changes})


def test_several_networks_refuse_what_does_not_fit(tmp_path: Path) -> None:
    network = sfumato.MultiControlNetModel([sfumato.ControlNetModel(**FOLLOWING)] * 2)
    arguments = start(FOLLOWING) | {"controlnet_cond": [picture()] * 2, "conditioning_scale": [0.5, 0.5]}
    with pytest.raises(ValueError, match=r"conditioning_scale is 0\.5: MultiControlNetModel holds 2 networks"):
        network(**{**arguments, "conditioning_scale": 0.5})
    with pytest.raises(ValueError, match="controlnet_cond is 3 values"):
        network(**{**arguments, "controlnet_cond": [picture()] * 3})
    with pytest.raises(TypeError, match=r"controlnets\[0\] is a T2IAdapter: expected a ControlNetModel"):
        sfumato.MultiControlNetModel([sfumato.T2IAdapter(channels=[32])])
    with pytest.raises(ValueError, match="adapters is empty"):
        sfumato.MultiAdapter([])
    with pytest.raises(HubError, match="is no folder here; from the hub load each"):
        sfumato.MultiControlNetModel.from_pretrained("owner/name")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ControlNetModel", {"controlnet_conditioning_channel_order": "gbr"}, "controlnet_conditioning_channel_order='gbr'"),
        ("ControlNetModel", {"mid_block_type": "MidBlock"}, "mid_block_type='MidBlock'"),
        ("ControlNetModel", {"num_attention_heads": 64}, "num_attention_heads=64 does not fit the 32 channels"),
        ("ControlNetModel", {"attention_head_dim": (4, 4, 4)}, "attention_head_dim.*has 3 values"),
        ("ControlNetUnionModel", {}, "addition_time_embed_dim=None"),
        ("ControlNetUnionModel", {"addition_time_embed_dim": 6}, "num_trans_channel=320.*=32"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_built(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(sfumato, name)(**{**FOLLOWING, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ctrl_block_out_channels": (8, 16, 16)}, "begin with ctrl_: block_out_channels.*has 3 values"),
        ({"ctrl_num_attention_heads": (2, 40)}, "begin with ctrl_: num_attention_heads=40 does not fit the 20 channels of level 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 does not fit"),
        ({"norm_num_groups": 24}, "norm_num_groups=24"),
        ({"time_embedding_mix": 0.5}, "set learn_time_embedding=True"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types='AttnDownBlock2D'"),
    ],
    ids=str,
)
def test_steered_unets_that_cannot_be_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sfumato.UNetControlNetXSModel(**{**XS_BASE, "num_attention_heads": 2, **config})


@pytest.mark.parametrize("kind", ["sd15", "union", "xs"])
@torch.no_grad()
def test_each_sample_can_have_a_weight_of_its_own(kind: str) -> None:
    network, arguments = control_call(kind)
    each = network(**arguments, conditioning_scale=torch.tensor([0.3, 0.8]).view(2, 1, 1, 1))
    for i, scale in enumerate((0.3, 0.8)):
        alone = network(**arguments, conditioning_scale=scale)
        for a, b in zip(*((o.to_tuple() if kind == "xs" else residuals(o)) for o in (each, alone)), strict=True):
            assert_same(a[i], b[i])


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "union", "xs"])
@torch.no_grad()
def test_residuals_have_the_dtype_of_the_network(kind: str) -> None:
    network, arguments = control_call(kind)

    def halved(value: Any) -> Any:
        if isinstance(value, (dict, list)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            made = {key: halved(item) for key, item in pairs}
            return made if isinstance(value, dict) else list(made.values())
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    scale = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1)
    output = network.bfloat16()(**halved(arguments), conditioning_scale=scale)
    assert {r.dtype for r in (output.to_tuple() if kind == "xs" else residuals(output))} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter_type": "heavy"}, "adapter_type='heavy' is unknown"),
        ({"adapter_type": "full_adapter_xl", "channels": [8, 8, 8, 16]}, "must be equal"),
        ({"adapter_type": "light_adapter", "channels": [6]}, "multiples of 4"),
    ],
    ids=str,
)
def test_t2i_adapters_that_cannot_be_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sfumato.T2IAdapter(**config)


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 3, 60, 64), (3, 64, 64)], ids=str)
def test_t2i_adapter_refuses_pictures_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*multiples of 8"):
        sfumato.T2IAdapter(channels=[32])(torch.zeros(shape))


def test_gradients_reach_the_way_down_through_checkpointing() -> None:
    network, _ = pair("ControlNetModel", FOLLOWING)
    arguments = start(FOLLOWING) | {"controlnet_cond": picture()}
    grads = []
    for checkpointing in (False, True):
        network.zero_grad()
        network._set_gradient_checkpointing(checkpointing)
        sum(r.sum() for r in residuals(network(**arguments))).backward()
        grads.append(network.controlnet_cond_embedding.conv_in.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)
