"""The transformers of Stable Diffusion 3 and FLUX.1, and their ControlNets, against the reference's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from tiny import noise, randomize
from transformer_configs import CONTROL, MAIN, PUBLISHED, TINY

import sfumato
from sfumato.config import plain
from sfumato.errors import ConfigError
from sfumato.models.layers.compute import GELULinear, RMSNorm
from sfumato.models.layers.joint_attention import Joint, JointAttention, JointBlock
from sfumato.models.layers.options import AttentionOptions, Perturbation, joint_region_mask
from sfumato.models.layers.processors import AttnProcessor
from sfumato.models.layers.rope import rope_table, rotate


def reference(name: str) -> Any:
    cls, config = TINY[name]
    return randomize(getattr(diffusers, cls)(**config))


def ours(name: str) -> Any:
    cls, config = TINY[name]
    return randomize(getattr(sfumato, cls)(**config))


def both(name: str) -> tuple[Any, Any]:
    """Our network and the reference's with the same weights."""
    mine, theirs = ours(name), reference(name)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def places(height: int, width: int, picture: int = 0) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1).flatten(0, 1).float()


def inputs(name: str, height: int = 6, width: int = 4, batch: int = 2) -> dict[str, Any]:
    """Arguments of a picture of ``height`` x ``width`` tokens."""
    kind, config = TINY[name]
    result: dict[str, Any] = {
        "encoder_hidden_states": noise(batch, 5, 24, seed=2),
        "pooled_projections": noise(batch, 20, seed=3),
        "timestep": torch.tensor([900.0, 31.5])[:batch],
    }
    if kind.startswith("SD3"):
        result["hidden_states"] = noise(batch, 4, 2 * height, 2 * width)
        if kind == "SD3ControlNetModel":
            channels = 4 + config.get("extra_conditioning_channels", 0)
            result["controlnet_cond"] = noise(batch, channels, 2 * height, 2 * width, seed=5)
        if config["joint_attention_dim"] is None:
            result |= {"encoder_hidden_states": None, "hidden_states": noise(batch, height * width, 32)}
        return result
    result["timestep"] = result["timestep"] / 1000
    result["hidden_states"] = noise(batch, height * width, config["in_channels"])
    result |= {"img_ids": places(height, width), "txt_ids": torch.zeros(5, 3)}
    if config.get("guidance_embeds"):
        result["guidance"] = torch.tensor([3.5, 2.0])[:batch]
    if kind == "FluxControlNetModel":
        result["controlnet_cond"] = noise(batch, height * width, config["in_channels"], seed=5)
        if "conditioning_embedding_channels" in config:
            result["controlnet_cond"] = noise(batch, 3, 16 * height, 16 * width, seed=5)
        if "num_mode" in config:
            result["controlnet_mode"] = torch.tensor([[1], [3]])[:batch]
    return result


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, in order."""
    found: list[torch.Tensor] = []
    for part in output if isinstance(output, tuple) else output.to_tuple():
        found += [part] if isinstance(part, torch.Tensor) else part or []
    return found


def assert_same(mine: Any, theirs: Any) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_outputs_and_files_equal_the_reference(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = getattr(sfumato, TINY[name][0]).from_pretrained(tmp_path / "theirs")
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in loaded.state_dict().items()} == shapes
    for height, width in ((6, 4), (3, 5)):
        arguments = inputs(name, height, width)
        mine, expected = loaded(**arguments), theirs(**arguments)
        assert type(mine).__name__ == type(expected).__name__
        assert list(mine.keys()) == list(expected.keys())
        assert_same(tensors(mine), tensors(expected))
    assert isinstance(loaded(**arguments, return_dict=False), tuple)
    loaded.save_pretrained(tmp_path / "ours")
    assert_same(tensors(type(theirs).from_pretrained(tmp_path / "ours")(**arguments)), tensors(expected))


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("form", ["scalar", "one", "integers"])
@torch.no_grad()
def test_timesteps_of_every_form(name: str, form: str) -> None:
    (mine, theirs), arguments = both(name), inputs(name)
    value = 1 if form == "integers" else 0.5
    times = {"scalar": torch.tensor(value), "one": torch.tensor([value]), "integers": torch.tensor([value, 0])}[form]
    spread = times.expand(2).contiguous()
    expected = theirs(**{**arguments, "timestep": spread}).sample
    assert_same([mine(**{**arguments, "timestep": times}).sample], [expected])
    if form == "scalar":
        assert_same([mine(**{**arguments, "timestep": value}).sample], [expected])


@torch.no_grad()
def test_places_with_a_batch_dimension() -> None:
    (mine, theirs), arguments = both("flux dev"), inputs("flux dev")
    batched = {**arguments, "img_ids": arguments["img_ids"][None], "txt_ids": arguments["txt_ids"][None]}
    assert_same([mine(**batched).sample], [theirs(**batched).sample])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_sd3_residuals_and_skipped_layers(count: int) -> None:
    (mine, theirs), arguments = both("sd3.5 medium"), inputs("sd3.5 medium")
    arguments["block_controlnet_hidden_states"] = [noise(2, 24, 32, seed=10 + i) for i in range(count)]
    assert_same([mine(**arguments).sample], [theirs(**arguments).sample])
    for skipped in ([1], [0, 3]):
        expected = theirs(**arguments, skip_layers=skipped).sample
        assert_same([mine(**arguments, skip_layers=skipped).sample], [expected])
        layers = frozenset(mine.transformer_blocks[i] for i in skipped)
        options = AttentionOptions(Perturbation("skip", layers))
        assert_same([mine(**arguments, joint_attention_kwargs=options).sample], [expected])


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("counts", [(1, 0), (2, 2), (3, 3), (0, 4)])
@torch.no_grad()
def test_flux_residuals(counts: tuple[int, int], repeat: bool) -> None:
    (mine, theirs), arguments = both("flux dev"), inputs("flux dev")
    for key, count in zip(("controlnet_block_samples", "controlnet_single_block_samples"), counts, strict=True):
        arguments[key] = [noise(2, 24, 32, seed=10 + i) for i in range(count)] if count else None
    arguments["controlnet_blocks_repeat"] = repeat
    assert_same([mine(**arguments).sample], [theirs(**arguments).sample])


@torch.no_grad()
def test_flux_skips_blocks_of_both_kinds() -> None:
    """A network without some blocks is the network that skips them."""
    whole, arguments = ours("flux dev"), inputs("flux dev")
    layers = {whole.transformer_blocks[1], whole.single_transformer_blocks[0]}
    skipped = whole(**arguments, joint_attention_kwargs=AttentionOptions(Perturbation("skip", frozenset(layers)))).sample
    del whole.transformer_blocks[1], whole.single_transformer_blocks[0]
    assert torch.equal(whole(**arguments).sample, skipped)


@pytest.mark.parametrize("name", CONTROL)
@torch.no_grad()
def test_conditioning_scale(name: str) -> None:
    (mine, theirs), arguments = both(name), inputs(name)
    expected = tensors(theirs(**arguments, conditioning_scale=0.6))
    assert_same(tensors(mine(**arguments, conditioning_scale=0.6)), expected)
    assert_same(tensors(mine(**arguments, conditioning_scale=torch.tensor(0.6))), expected)


MULTI = {
    "sd3": ("SD3MultiControlNetModel", ["sd3 controlnet", "sd3 controlnet"]),
    "flux": ("FluxMultiControlNetModel", ["flux controlnet", "flux controlnet"]),
    "flux union": ("FluxMultiControlNetModel", ["flux union controlnet"]),
}


@pytest.mark.parametrize("name", MULTI)
@torch.no_grad()
def test_several_controlnets(name: str, tmp_path: Path) -> None:
    cls, members = MULTI[name]
    networks, references = zip(*(both(member) for member in members), strict=True)
    mine, theirs = getattr(sfumato, cls)(networks), getattr(diffusers, cls)(references)
    for model in (mine, theirs):
        for i, network in enumerate(model.nets):
            network.controlnet_blocks[0].bias.fill_(i + 1)
    assert list(mine.state_dict()) and set(mine.state_dict()) == set(theirs.state_dict())
    arguments = inputs(members[0])
    picture = arguments.pop("controlnet_cond")
    arguments |= {"controlnet_cond": [picture, picture.flip(1)], "conditioning_scale": [0.5, 0.9]}
    if name != "sd3":
        modes = arguments.pop("controlnet_mode", torch.zeros(2, 1, dtype=torch.long)).flatten()
        arguments["controlnet_mode"] = [modes, modes.flip(0)]
    expected = tensors(theirs(**arguments, return_dict=False))
    if name == "flux":  # where the reference ignores modes, and fails without them
        arguments["controlnet_mode"] = [None, None]
    assert_same(tensors(mine(**arguments)), expected)
    mine.save_pretrained(tmp_path / "controlnet")
    assert_same(tensors(getattr(sfumato, cls).from_pretrained(tmp_path / "controlnet")(**arguments)), expected)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd3", {"num_layers": 2, "num_extra_conditioning_channels": 0}),
        ("sd3.5 large", {"num_layers": 3, "num_extra_conditioning_channels": 1}),
        ("flux dev", {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}),
    ],
)
def test_from_transformer(name: str, options: dict[str, Any], loaded: bool) -> None:
    cls = TINY[name][0].replace("Transformer2D", "ControlNet")
    options = {**options, "load_weights_from_transformer": loaded}
    mine, theirs = (getattr(m, cls).from_transformer(t, **options) for m, t in zip((sfumato, diffusers), both(name), strict=True))
    expected, state = theirs.state_dict(), mine.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    fresh = [key for key in state if not key.startswith(("transformer_blocks", "single_", "time_", "context_", "x_", "pos_embed."))]
    for key in state if loaded else fresh:
        assert torch.equal(state[key], expected[key]), key
    assert {key: plain(mine.config[key]) for key in mine._init_parameters()} == {
        key: plain(value) for key, value in theirs.config.items() if not key.startswith("_")
    }
    with torch.no_grad():
        residuals = tensors(mine(**inputs(name), controlnet_cond=_picture_for(mine)))
    assert all(residual.count_nonzero() == 0 for residual in residuals)


def _picture_for(network: Any) -> torch.Tensor:
    if isinstance(network, sfumato.FluxControlNetModel):
        return noise(2, 24, 16)
    return noise(2, network.pos_embed_input.proj.in_channels, 12, 8)


def test_from_transformer_of_another_size() -> None:
    with pytest.raises(ConfigError, match="fewer layers"):
        sfumato.SD3ControlNetModel.from_transformer(ours("sd3"), num_layers=4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    cls, config = PUBLISHED[name]
    with torch.device("meta"):
        mine, theirs = getattr(sfumato, cls)(**config), getattr(diffusers, cls)(**config)
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in mine.state_dict().items()} == expected
    assert mine.num_parameters() == theirs.num_parameters()
    assert [n for n, _ in mine.named_buffers() if n not in expected] == []


@torch.no_grad()
def test_redux() -> None:
    theirs, mine = randomize(diffusers.ReduxImageEncoder(12, 10)), sfumato.ReduxImageEncoder(12, 10)
    mine.load_state_dict(theirs.state_dict())
    x = noise(2, 7, 12)
    torch.testing.assert_close(mine(x).image_embeds, theirs(x).image_embeds)
    with pytest.raises(ValueError, match=r"x has shape \(2, 12\)"):
        mine(x[:, 0])


def gradients(model: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    sum(t.square().mean() for t in tensors(model(**arguments))).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["sd3.5 medium", "flux dev", "sd3 controlnet", "flux union controlnet"])
def test_gradients(name: str) -> None:
    """They equal the reference's, and those with checkpointing."""
    (mine, theirs), arguments = both(name), inputs(name)
    plain, named = gradients(mine, arguments), dict(theirs.named_parameters())
    gradients(theirs, arguments)
    for key, parameter in mine.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, named[key].grad, rtol=1e-4, atol=1e-5, msg=key)
    mine.enable_gradient_checkpointing()
    assert_same(gradients(mine, arguments), plain)
    mine.disable_gradient_checkpointing()


@pytest.mark.parametrize("name", ["sd3.5 medium", "flux dev"])
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_reference(name: str) -> None:
    (mine, theirs), arguments = both(name), inputs(name)
    expected = theirs(**arguments).sample
    kept = ("timestep", "img_ids", "txt_ids", "guidance")
    half = {key: value if key in kept else value.bfloat16() for key, value in arguments.items()}
    found, reference_found = mine.bfloat16()(**half).sample, theirs.bfloat16()(**half).sample
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).norm() < 1.1 * (reference_found.float() - expected).norm()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, arguments = ours(name), inputs(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(tensors(compiled(**arguments)), tensors(model(**arguments)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sd3.5 medium", "flux dev", "flux controlnet"])
@torch.no_grad()
def test_compiles_by_inductor(name: str) -> None:
    torch._dynamo.reset()
    model, arguments = ours(name), inputs(name)
    found = tensors(torch.compile(model, fullgraph=True)(**arguments))
    for tensor, expected in zip(found, tensors(model(**arguments)), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiles_with_residuals_and_does_not_compile_again_for_a_scale() -> None:
    torch._dynamo.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    network, control = ours("flux dev"), ours("flux controlnet")
    compiled, compiled_control = (torch.compile(m, backend=backend, fullgraph=True) for m in (network, control))
    arguments, control_arguments = inputs("flux dev"), inputs("flux controlnet")
    keys = ("controlnet_block_samples", "controlnet_single_block_samples")
    for scale in (0.5, 0.9):
        residuals = compiled_control(**control_arguments, conditioning_scale=torch.tensor(scale)).to_tuple()
        expected = control(**control_arguments, conditioning_scale=scale).to_tuple()
        assert_same(residuals[0], expected[0])
        found = compiled(**arguments, **dict(zip(keys, residuals, strict=True))).sample
        assert_same([found], [network(**arguments, **dict(zip(keys, expected, strict=True))).sample])
    assert count == 2
    sd3 = ours("sd3")
    arguments = {**inputs("sd3"), "block_controlnet_hidden_states": [noise(2, 24, 32, seed=i) for i in range(2)]}
    compiled = torch.compile(sd3, backend=backend, fullgraph=True)
    assert_same([compiled(**arguments).sample], [sd3(**arguments).sample])


@torch.no_grad()
def test_compiles_with_what_a_call_asks_of_attention() -> None:
    network, arguments = ours("flux dev"), inputs("flux dev")
    size = tuple(int(side) + 1 for side in arguments["img_ids"][:, 1:].amax(dim=0))
    layers = frozenset(m for m in network.modules() if isinstance(m, JointAttention))
    for asked in ({"regions": noise(2, 1, *size) > 0}, {"perturbation": Perturbation("blur", layers, 1.0)}):
        torch._dynamo.reset()
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        found = compiled(**arguments, joint_attention_kwargs=AttentionOptions(**asked, size=size)).sample
        expected = network(**arguments, joint_attention_kwargs=AttentionOptions(**asked)).sample  # which counts the places
        assert_same([found], [expected])


# --- callers' own processors

PROCESSORS = {"sd3": JointAttnProcessor2_0, "sd3.5 medium": JointAttnProcessor2_0, "flux dev": FluxAttnProcessor}


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_processors_of_the_field_work_in_joint_attention(name: str) -> None:
    network, arguments = ours(name), inputs(name)
    expected = network(**arguments).sample
    layers = [layer for layer in network.modules() if isinstance(layer, JointAttention)]
    assert len(network.attn_processors) == len(layers)
    network.set_attn_processor(PROCESSORS[name]())
    assert all(isinstance(layer.get_processor(), PROCESSORS[name]) for layer in layers)
    assert_same([network(**arguments).sample], [expected])
    network.set_attn_processor(AttnProcessor())
    assert torch.equal(network(**arguments).sample, expected)


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_a_processor_can_wrap_the_layers_own_computation(name: str) -> None:
    network, arguments, seen = ours(name), inputs(name), []

    class Wrapper:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, **more: Any) -> Any:
            seen.append(sorted(more))
            return AttnProcessor()(attn, hidden_states, **more)

    expected = network(**arguments).sample
    network.set_attn_processor(Wrapper())
    assert_same([network(**arguments).sample], [expected])
    rope = ["image_rotary_emb"] if name == "flux dev" else []
    assert seen == [["attention_mask", "encoder_hidden_states", *rope]] * len(network.attn_processors)
    if name == "flux dev":  # whose mask of regions reaches the layers that see the text among the image
        asked = AttentionOptions(regions=torch.tensor([[[[1.0, 0.0]]]]).expand(2, -1, -1, -1))
        kept = network(**arguments, joint_attention_kwargs=asked).sample
        network.set_attn_processor(AttnProcessor())
        assert_same([kept], [network(**arguments, joint_attention_kwargs=asked).sample])


# --- what a call asks of attention


def joint(text: int, image: tuple[int, int], **options: Any) -> Joint:
    regions = options.get("regions")
    mask = None if regions is None else joint_region_mask(regions, *image, text)
    return Joint(noise(2, 32, seed=8), image[0] * image[1], image, mask=mask, options=AttentionOptions(**options))


@torch.no_grad()
def test_identity_is_the_references_perturbed_attention() -> None:
    from diffusers.models.attention_processor import Attention, PAGJointAttnProcessor2_0

    theirs = Attention(
        query_dim=32, added_kv_proj_dim=32, dim_head=16, heads=2, out_dim=32, context_pre_only=False, bias=True, qk_norm=None,
        processor=PAGJointAttnProcessor2_0(),
    )  # fmt: skip
    mine = JointAttention(32, 2, 16, qk_norm=False)
    mine.load_state_dict(randomize(theirs).state_dict())
    x, text = noise(2, 6, 32), noise(2, 5, 32, seed=1)
    # the reference perturbs the second half of a batch
    expected = theirs(torch.cat([x, x]), torch.cat([text, text]))
    options = {"perturbation": Perturbation("identity", frozenset([mine]))}
    assert_same(mine(x, text, joint(5, (2, 3))), [part[:2] for part in expected])
    assert_same(mine(x, text, joint(5, (2, 3), **options)), [part[2:] for part in expected])


@torch.no_grad()
def test_identity_without_text_answers_the_values() -> None:
    mine = randomize(JointAttention(32, 2, 16, qk_norm=True, text=False))
    x = noise(2, 6, 32)
    found, _ = mine(x, None, joint(0, (2, 3), perturbation=Perturbation("identity", frozenset([mine]))))
    torch.testing.assert_close(found, mine.to_out(mine.to_v(x)))


@torch.no_grad()
def test_blur_without_bound_gives_all_pixels_one_answer() -> None:
    mine = randomize(JointAttention(32, 2, 16, qk_norm=False))
    x, text = noise(2, 6, 32), noise(2, 5, 32, seed=1)
    plain, plain_text = mine(x, text, joint(5, (2, 3)))
    options = joint(5, (2, 3), perturbation=Perturbation("blur", frozenset([mine]), 1e5))
    found, found_text = mine(x, text, options)
    torch.testing.assert_close(found, found[:, :1].expand_as(found))
    torch.testing.assert_close(found_text, plain_text)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3.5 medium", "flux dev", "sd3 controlnet", "flux union controlnet"])
@torch.no_grad()
def test_one_region_that_covers_all_changes_nothing(name: str) -> None:
    model, arguments = ours(name), inputs(name)
    everywhere = AttentionOptions(regions=torch.ones(2, 1, 12, 8))
    assert_same(tensors(model(**arguments, joint_attention_kwargs=everywhere)), tensors(model(**arguments)))


@pytest.mark.parametrize("text_out", [True, False])
@torch.no_grad()
def test_a_pixel_does_not_see_the_prompt_of_another_region(text_out: bool) -> None:
    block = randomize(JointBlock(32, 2, 16, qk_norm=True, text_out=text_out))
    left = torch.zeros(2, 1, 2, 4)
    left[..., :2] = 1
    regions = torch.cat([left, 1 - left], dim=1)  # two prompts of three tokens
    x, text = noise(2, 8, 32), noise(2, 6, 32, seed=1)
    other = torch.cat([text[:, :3], noise(2, 3, 32, seed=2)], dim=1)
    (a, a_text), (b, b_text) = (block(x, t, joint(6, (2, 4), regions=regions)) for t in (text, other))
    is_left = left[0, 0].flatten() > 0
    assert torch.equal(a[:, is_left], b[:, is_left])
    assert not torch.allclose(a[:, ~is_left], b[:, ~is_left], atol=1e-3)
    if text_out:
        assert torch.equal(a_text[:, :3], b_text[:, :3])


@torch.no_grad()
def test_regions_leave_further_pictures_alone() -> None:
    """Tokens of a second picture (first axis 1) are no pixels of a region."""
    model, arguments = ours("flux dev"), inputs("flux dev")
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], noise(2, 6, 16, seed=9)], dim=1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], places(2, 3, picture=1)])
    everywhere = AttentionOptions(regions=torch.ones(2, 1, 6, 4))
    assert_same([model(**arguments, joint_attention_kwargs=everywhere).sample], [model(**arguments).sample])


@pytest.mark.parametrize("kind", ["identity", "blur"])
@pytest.mark.parametrize("name", ["sd3.5 medium", "flux dev"])
@torch.no_grad()
def test_perturbed_layers_change_the_prediction(name: str, kind: str) -> None:
    model, arguments = ours(name), inputs(name)
    plain = model(**arguments).sample
    for layer in (m for m in model.modules() if isinstance(m, JointAttention)):
        options = AttentionOptions(Perturbation(kind, frozenset([layer]), 1.0))
        found = model(**arguments, joint_attention_kwargs=options).sample
        assert found.isfinite().all()
        assert not torch.allclose(found, plain, atol=1e-4)


# --- layers


@torch.no_grad()
def test_rotation_is_a_rotation() -> None:
    """RoPE's defining property: the product of a rotated query and key depends on their distance alone, per axis."""
    q, k, dims = noise(1, 1, 1, 16, seed=1), noise(1, 1, 1, 16, seed=2), (4, 6, 6)

    def product(a: list[float], b: list[float]) -> torch.Tensor:
        turned = (rotate(x, rope_table(torch.tensor([ids]), dims)) for x, ids in ((q, a), (k, b)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(product([0, 3, 7], [1, 5, 2]), product([10, 23, 8], [11, 25, 3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product([5, 5, 5], [5, 5, 5]), (q * k).sum(), rtol=1e-5, atol=1e-5)
    table = rope_table(places(3, 4), dims)
    x = noise(2, 12, 2, 16)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_layers_compute_what_torch_does(dtype: torch.dtype) -> None:
    norm, linear = randomize(RMSNorm(64, 1e-6)).to(dtype), randomize(GELULinear(256, 512)).to(dtype)
    x, tokens = noise(2, 40, 3, 64).to(dtype) * 3, noise(2, 40, 256).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for layer, given in ((norm, x), (linear, tokens)):
        with torch.no_grad():
            found = layer(given)
        assert found.dtype is dtype and not found.requires_grad
        torch.testing.assert_close(found, layer(given).detach(), **tolerance)


@torch.no_grad()
def test_inputs_are_left_as_they_are() -> None:
    for name in ("sd3.5 medium", "flux dev"):
        model, arguments = ours(name), inputs(name)
        first = model(**arguments).sample
        assert torch.equal(model(**arguments).sample, first)
        assert torch.equal(arguments["hidden_states"], inputs(name)["hidden_states"])


# --- what a user can get wrong

WRONG_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "norm": ("sd3", {"qk_norm": "layer"}, "qk_norm='layer'.*'rms_norm'"),
    "width": ("sd3", {"caption_projection_dim": 48}, "caption_projection_dim=48.*= 32"),
    "dual": ("sd3", {"dual_attention_layers": (7,)}, "dual_attention_layers names layer 7"),
    "axes": ("flux dev", {"axes_dims_rope": (4, 4, 6)}, "axes_dims_rope=.*attention_head_dim=16"),
    "odd axes": ("flux dev", {"axes_dims_rope": (5, 5, 6)}, "even"),
    "places": ("sd3 controlnet", {"pos_embed_type": "rope"}, "pos_embed_type='rope'"),
    "hint": ("flux hint controlnet", {"patch_size": 1}, "conditioning_embedding_channels=4.*in_channels=16"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configurations(case: str) -> None:
    name, changes, message = WRONG_CONFIGS[case]
    cls, config = TINY[name]
    with pytest.raises(ConfigError, match=message):
        getattr(sfumato, cls)(**{**config, **changes})


WRONG_CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no text": ("sd3", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
    "text width": ("sd3", {"encoder_hidden_states": noise(2, 5, 23)}, r"encoder_hidden_states has shape \(2, 5, 23\)"),
    "batch": ("sd3", {"pooled_projections": noise(1, 20)}, r"pooled_projections has shape \(1, 20\), expected \(2, 20\)"),
    "no time": ("sd3", {"timestep": None}, "timestep is missing"),
    "channels": ("sd3", {"hidden_states": noise(2, 5, 12, 8)}, r"expected \(any, 4, any, any\)"),
    "odd": ("sd3", {"hidden_states": noise(2, 4, 11, 8)}, "multiples of the patch, 2"),
    "large": ("sd3", {"hidden_states": noise(2, 4, 26, 8)}, "13 x 4 patches.*12 a side: make the picture smaller"),
    "skip": ("sd3", {"skip_layers": [9]}, "block 9.*0 to 3"),
    "count": ("sd3", {"block_controlnet_hidden_states": [noise(2, 24, 32)] * 5}, "5 tensors for 4 blocks"),
    "residual": ("sd3", {"block_controlnet_hidden_states": [noise(2, 20, 32)]}, r"block_controlnet_hidden_states\[0\]"),
    "kwargs": ("flux dev", {"joint_attention_kwargs": {"scale": 2}}, "joint_attention_kwargs="),
    "no guidance": ("flux dev", {"guidance": None}, "guidance is missing"),
    "guidance": ("flux schnell", {"guidance": torch.ones(2)}, "guidance is given: pass None"),
    "places": ("flux dev", {"img_ids": places(5, 5)}, r"img_ids has shape \(25, 3\), expected \(24, 3\)"),
    "no places": ("flux dev", {"txt_ids": None}, "txt_ids is missing"),
    "packed": ("flux dev", {"hidden_states": noise(2, 4, 12, 8)}, "pack the latents"),
    "times": ("flux dev", {"timestep": torch.ones(3)}, "3 times for a batch of 2"),
    "single": ("flux dev", {"controlnet_single_block_samples": [noise(2, 29, 32)]}, r"controlnet_single_block_samples\[0\]"),
    "condition": ("sd3 controlnet", {"controlnet_cond": noise(2, 4, 12, 8)}, r"controlnet_cond.*expected \(2, 5, 12, 8\)"),
    "tokens": ("sd3.5 large controlnet", {"hidden_states": noise(2, 4, 12, 8)}, "transformer's pos_embed"),
    "text": ("sd3.5 large controlnet", {"encoder_hidden_states": noise(2, 5, 24)}, "encoder_hidden_states is given"),
    "no mode": ("flux union controlnet", {"controlnet_mode": None}, "controlnet_mode is missing"),
    "mode": ("flux controlnet", {"controlnet_mode": torch.zeros(2, 1)}, "controlnet_mode is given"),
    "cond": ("flux controlnet", {"controlnet_cond": noise(2, 20, 16)}, "pack it as the latents"),
    "hint": ("flux hint controlnet", {"controlnet_cond": noise(2, 3, 64, 64)}, "4 x 4 tokens, not the 24"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
@torch.no_grad()
def test_wrong_calls(case: str) -> None:
    name, changes, message = WRONG_CALLS[case]
    with pytest.raises(ValueError, match=message):
        ours(name)(**{**inputs(name), **changes})


@torch.no_grad()
def test_regions_need_a_whole_picture() -> None:
    arguments = inputs("flux dev")
    arguments["img_ids"] = arguments["img_ids"].clone()
    arguments["img_ids"][-1, 1] = 40
    with pytest.raises(ValueError, match="whole pictures"):
        ours("flux dev")(**arguments, joint_attention_kwargs=AttentionOptions(regions=torch.ones(2, 1, 6, 4)))


@torch.no_grad()
def test_controlnets_of_different_depth_do_not_add_up() -> None:
    cls, config = TINY["sd3 controlnet"]
    several = sfumato.SD3MultiControlNetModel([ours("sd3 controlnet"), getattr(sfumato, cls)(**{**config, "num_layers": 3})])
    arguments = inputs("sd3 controlnet")
    picture = arguments.pop("controlnet_cond")
    with pytest.raises(ValueError, match=r"\[2, 3\] residuals"):
        several(**arguments, controlnet_cond=[picture] * 2, conditioning_scale=[1.0, 1.0])
    with pytest.raises(ValueError, match="controlnet_cond is 1 values"):
        several(**arguments, controlnet_cond=[picture], conditioning_scale=[1.0, 1.0])
