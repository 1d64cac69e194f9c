"""Guidance: against the reference's guiders and pipelines, and against the papers' formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import guiders
from test_pipelines import CALLS, TEXT, assert_same, ours, seeded

import sfumato
from sfumato.pipelines.guiders import collapse, pyramid
from sfumato.pipelines.weak_models import find_layers

Checkpoint = Callable[[str], tuple[Path, Any]]
STEPS = 20


def draw(seed: int = 0, shape: tuple[int, ...] = (2, 4, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(step: int) -> Any:
    """What a guidance reads of a run."""
    times = torch.linspace(1000, 0, STEPS + 1)[:-1]
    return SimpleNamespace(index=step, timesteps=times, latents=draw(9))


# --- the reference's guiders ----------------------------------------------------------------------------------------

BRANCHED = {
    "plain": ("ClassifierFreeGuidance", {}),
    "zero star": ("ClassifierFreeZeroStarGuidance", dict(zero_init_steps=2)),
    "projected": ("AdaptiveProjectedGuidance", dict(adaptive_projected_guidance_rescale=5.0, eta=0.3)),
    "projected, longest": ("AdaptiveProjectedGuidance", dict(adaptive_projected_guidance_rescale=0.0, eta=0.0)),
    "projected, momentum": ("AdaptiveProjectedGuidance", dict(adaptive_projected_guidance_momentum=-0.5, eta=0.5)),
    "tangential": ("TangentialClassifierFreeGuidance", {}),
}


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("case", BRANCHED)
def test_same_prediction_as_the_references_guider(case: str, rescale: float, original: bool) -> None:
    name, options = BRANCHED[case]
    options = {**options, "guidance_rescale": rescale, "use_original_formulation": original}
    theirs, mine = getattr(guiders, name)(4.0, **options), getattr(sfumato, name)(4.0, **options)
    for step in range(4):
        conditional, unconditional = draw(step), draw(step + 10)
        theirs.set_state(step, STEPS, torch.tensor(900))
        theirs.prepare_inputs({"x": (conditional, unconditional)})
        expected = theirs.forward(conditional, unconditional)[0]
        passes = mine.passes(at(step))
        predictions = [(unconditional, conditional)[p.branch] for p in passes]
        got = mine.combine(predictions, at(step))
        if rescale and not predictions:  # the reference divides zero by zero
            assert not got.any()
        else:
            torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)


WEAK = {
    "PerturbedAttentionGuidance": "perturbed_guidance",
    "SkipLayerGuidance": "skip_layer_guidance",
    "SmoothedEnergyGuidance": "seg_guidance",
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_rescale": 0.6}, {"use_original_formulation": True}, {"guidance_scale": 0.0, "use_original_formulation": True}],
)
@pytest.mark.parametrize("name", WEAK)
def test_same_prediction_as_the_references_weak_models(name: str, changes: dict[str, Any]) -> None:
    prefix = WEAK[name]
    options = {"guidance_scale": 4.0, f"{prefix}_scale": 2.0, f"{prefix}_stop": 0.25, f"{prefix}_layers": [1], **changes}
    theirs, mine = getattr(guiders, name)(**options), getattr(sfumato, name)(**options)
    weak = [draw(20), draw(21)]
    for step in range(8):
        conditional, unconditional = draw(step), draw(step + 10)
        theirs.set_state(step, STEPS, torch.tensor(900))
        passes = mine.passes(at(step))
        assert len(passes) == theirs.num_conditions
        whole = [conditional] if mine.branches == 1 else [unconditional, conditional]
        skipped = weak[: len(passes) - len(whole)]
        order = [conditional, unconditional, weak[0]]
        named = {"pred_cond": order[0]}
        if len(whole) == 2:
            named["pred_uncond"] = unconditional
        if skipped:
            named["pred_cond_seg" if prefix == "seg_guidance" else "pred_cond_skip"] = weak[0]
        expected = theirs.forward(**named)[0]
        torch.testing.assert_close(mine.combine([*whole, *skipped], at(step)), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("stretch", [(0.0, 1.0), (0.12, 0.57), (0.5, 0.5)])
def test_same_steps_guided_as_the_references(stretch: tuple[float, float]) -> None:
    start, stop = stretch
    theirs = guiders.ClassifierFreeGuidance(4.0, start=start, stop=stop)
    mine = sfumato.ClassifierFreeGuidance(4.0, start=start, stop=stop)
    for step in range(STEPS):
        theirs.set_state(step, STEPS, torch.tensor(900))
        assert len(mine.passes(at(step))) == theirs.num_conditions


@pytest.mark.parametrize("name", sorted({*(name for name, _ in BRANCHED.values()), *WEAK}))
def test_a_guidance_takes_the_references_arguments(name: str) -> None:
    import inspect

    own, theirs = (inspect.signature(getattr(lib, name)).parameters for lib in (sfumato, guiders))
    shared = [n for n in theirs if n in own]
    left_out = {"enabled", "perturbed_guidance_config", "skip_layer_config", "seg_guidance_config", "seg_blur_threshold_inf"}
    left_out.add("adaptive_projected_guidance_norm_dim")  # the length of a prediction is that of all of it
    assert set(theirs) - set(own) <= left_out
    assert {n: own[n].default for n in shared} == {n: theirs[n].default for n in shared}


# --- the papers' formulas -------------------------------------------------------------------------------------------


def test_zero_star_starts_where_the_unconditional_fits_best() -> None:
    """With c = 3 u the best fit is c itself, so that nothing is left to guide."""
    u = draw()
    got = sfumato.ClassifierFreeZeroStarGuidance(7.0, zero_init_steps=0).combine([u, 3 * u], at(0))
    torch.testing.assert_close(got, 3 * u, atol=1e-5, rtol=1e-5)


def test_projected_guidance_without_the_parallel_part_keeps_the_projection() -> None:
    u, c = draw(0), draw(1)
    guidance = sfumato.APG(7.0, eta=0.0, adaptive_projected_guidance_rescale=0.0, use_original_formulation=True)
    moved = guidance.combine([u, c], at(0)) - c
    assert (moved * c).flatten(1).sum(1).abs().max() < 1e-3 * moved.norm() * c.norm()
    assert moved.norm() > 1


def test_tangential_guidance_of_parallel_predictions_is_the_plain_one() -> None:
    u = draw()
    plain, tangential = (cls(5.0).combine([u, 2 * u], at(0)) for cls in (sfumato.ClassifierFreeGuidance, sfumato.TCFG))
    torch.testing.assert_close(tangential, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
def test_a_pyramid_collapses_to_what_it_was(size: tuple[int, int]) -> None:
    x = draw(0, (2, 4, *size))
    bands = pyramid(x, 3)
    assert bands[1].shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    torch.testing.assert_close(collapse(bands), x, atol=1e-6, rtol=1e-6)


def test_frequencies_are_guided_by_scales_of_their_own() -> None:
    """A flat prediction has low frequencies alone, a checkerboard high ones alone, away from the edges."""
    u, flat = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    guidance = sfumato.FDG([10.0, 5.0])
    torch.testing.assert_close(guidance.combine([u, flat], at(0)), 5 * flat)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    got = guidance.combine([u, board.expand(1, 1, 16, 16)], at(0))
    torch.testing.assert_close(got[..., 4:-4, 4:-4], 10 * board[4:-4, 4:-4].expand(1, 1, 8, 8), atol=1e-4, rtol=1e-4)


def test_equal_scales_of_all_frequencies_are_plain_guidance() -> None:
    u, c = draw(0), draw(1)
    expected = sfumato.ClassifierFreeGuidance(4.0).combine([u, c], at(0))
    torch.testing.assert_close(sfumato.FDG([4.0, 4.0, 4.0]).combine([u, c], at(0)), expected, atol=1e-5, rtol=1e-5)
    whole = sfumato.FDG([4.0], parallel_weights=[0.0]).combine([u, c], at(0))
    along = sfumato.APG(4.0, eta=0.0, adaptive_projected_guidance_rescale=0.0).combine([u, c], at(0))
    torch.testing.assert_close(whole, along, atol=1e-5, rtol=1e-5)


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ["mid", "down", "up_blocks.1", "blocks.1", "own", "attentions.0", ["mid", "up"], "down_blocks.(0|1)"]
)
def test_names_choose_the_references_layers(names: Any, tmp_path: Path) -> None:
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
    network = tiny.unet(**blocks, transformer_layers_per_block=2)
    theirs = diffusers.StableDiffusionPAGPipeline(
        vae=None, text_encoder=None, tokenizer=None, scheduler=tiny.scheduler(), unet=network, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs._set_pag_attn_processor([names] if isinstance(names, str) else names, do_classifier_free_guidance=True)
    expected = {key.removesuffix(".processor") for key, p in network.attn_processors.items() if "PAG" in type(p).__name__}
    network.save_pretrained(tmp_path)
    mine = sfumato.UNet2DConditionModel.from_pretrained(tmp_path)
    found = find_layers(mine, "identity", names, "pag_applied_layers")
    assert {name for name, module in mine.named_modules() if module in found} == expected


def test_unknown_layers_are_refused_with_what_there_is(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPAGPipeline")
    pipe = ours(folder, reference)
    with pytest.raises(ValueError, match=r"pag_applied_layers has 'nowhere'.*mid_block\.attentions\.0"):
        pipe.set_pag_applied_layers("nowhere")
    with pytest.raises(ValueError, match="skip_layer_guidance_layers has 7, which names no layer"):
        pipe(**TEXT, guidance=sfumato.SLG(skip_layer_guidance_layers=7))
    with pytest.raises(ValueError, match="expected numbers of blocks or regular expressions"):
        pipe.set_pag_applied_layers("(")


# --- pipelines ------------------------------------------------------------------------------------------------------

PERTURBED: dict[str, dict[str, Any]] = {
    "unguided": dict(guidance_scale=1.0),
    "off": dict(guidance_scale=0.0, pag_scale=0.0),
    "adaptive": dict(pag_adaptive_scale=0.008),
    "rescaled": dict(guidance_rescale=0.7),
}


@pytest.mark.parametrize("case", PERTURBED)
@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline", "StableDiffusion3PAGPipeline"])
def test_same_picture_with_perturbed_attention(checkpoint: Checkpoint, name: str, case: str) -> None:
    if case == "rescaled" and "3PAG" in name:
        pytest.skip("the reference's pipeline takes no guidance_rescale")
    folder, reference = checkpoint(name)
    assert_same(reference, ours(folder, reference), **{**CALLS[name], **PERTURBED[case]})


@pytest.mark.parametrize("layers", ["down", ["mid", "up_blocks.1"]])
def test_same_picture_with_other_layers_perturbed(tmp_path: Path, layers: Any) -> None:
    reference = tiny.build("StableDiffusionXLPAGPipeline", tmp_path)
    pipe = ours(tmp_path, reference)
    for each in (reference, pipe):
        each.set_pag_applied_layers(layers)
    assert pipe.pag_applied_layers == reference.pag_applied_layers
    assert_same(reference, pipe, **TEXT)


def test_the_layers_are_saved_with_the_pipeline(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("StableDiffusionPAGPipeline")
    pipe = sfumato.StableDiffusionPAGPipeline.from_pretrained(folder, pag_applied_layers=["down", "mid"])
    pipe.save_pretrained(tmp_path)
    assert sfumato.DiffusionPipeline.from_pretrained(tmp_path).pag_applied_layers == ["down", "mid"]


def test_auto_pipelines_keep_or_change_perturbed_attention(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPAGPipeline")
    auto = sfumato.AutoPipelineForImage2Image
    assert type(auto.from_pipe(ours(folder, reference))).__name__ == "StableDiffusionPAGImg2ImgPipeline"
    assert type(auto.from_pipe(ours(folder, reference), enable_pag=False)).__name__ == "StableDiffusionImg2ImgPipeline"
    folder, _ = checkpoint("StableDiffusionXLPipeline")
    pipe = sfumato.AutoPipelineForText2Image.from_pretrained(folder, enable_pag=True, pag_applied_layers="down")
    assert (type(pipe).__name__, pipe.pag_applied_layers) == ("StableDiffusionXLPAGPipeline", ["down"])
    folder, _ = checkpoint("StableDiffusion3Pipeline")
    with pytest.raises(ValueError, match="no inpaint pipeline with perturbed-attention guidance"):
        sfumato.AutoPipelineForInpainting.from_pretrained(folder, enable_pag=True)


def test_same_picture_with_layers_left_out(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusion3Pipeline")
    pipe = ours(folder, reference)
    call = {**TEXT, "num_inference_steps": 8}
    plain = pipe(**call, generator=seeded(3)).images
    for options in ({}, {"skip_layer_guidance_scale": 5.0, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.7}):
        got = assert_same(reference, pipe, **call, skip_guidance_layers=[1], **options)
        assert np.abs(got - plain).max() > 1e-3


def test_layers_to_leave_out_that_nothing_reads_are_refused(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusion3Pipeline")
    pipe = ours(folder, reference)
    with pytest.raises(ValueError, match=r"skip_layer_guidance_stop=0\.5 is given without skip_guidance_layers"):
        pipe(**TEXT, skip_layer_guidance_stop=0.5)
    with pytest.raises(ValueError, match=r"nothing guides: raise guidance_scale above 1"):
        pipe(**{**TEXT, "guidance_scale": 1.0}, skip_guidance_layers=[1])


def everywhere(name: str, **options: Any) -> Any:
    """A weak-model guidance that acts at every step."""
    prefix = WEAK[name]
    return getattr(sfumato, name)(**{f"{prefix}_start": None, f"{prefix}_stop": 1.0, **options})


GUIDANCE: dict[str, Callable[[Any], Any]] = {
    **{
        case: (lambda pipe, name=name, options=options: getattr(sfumato, name)(5.0, **options))
        for case, (name, options) in BRANCHED.items()
    },
    "frequencies": lambda pipe: sfumato.FDG([6.0, 3.0]),
    "interval": lambda pipe: sfumato.ClassifierFreeGuidance(5.0, start=0.3, stop=0.8),
    "rescaled": lambda pipe: sfumato.ClassifierFreeGuidance(5.0, guidance_rescale=0.7),
    "perturbed": lambda pipe: everywhere("PerturbedAttentionGuidance"),
    "skipped": lambda pipe: everywhere("SkipLayerGuidance"),
    "smoothed": lambda pipe: everywhere("SmoothedEnergyGuidance"),
    "smoothed a little": lambda pipe: everywhere("SmoothedEnergyGuidance", seg_blur_sigma=2.0),
    "perturbed alone": lambda pipe: everywhere("PerturbedAttentionGuidance", guidance_scale=1.0),
    "perturbed on projected": lambda pipe: everywhere(
        "PerturbedAttentionGuidance", base=sfumato.APG(5.0, adaptive_projected_guidance_momentum=-0.5)
    ),
    "two weak models": lambda pipe: everywhere("SmoothedEnergyGuidance", base=everywhere("PerturbedAttentionGuidance")),
    "weaker network": lambda pipe: sfumato.AutoGuidance(2.0, network=weaker(pipe.denoiser)),
}
FAMILIES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]


def weaker(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network with other weights."""
    copy = type(network).from_config(network.config)  # type: ignore[attr-defined]
    copy.load_state_dict({key: tensor * 0.9 for key, tensor in network.state_dict().items()})
    return copy


@pytest.mark.parametrize("case", GUIDANCE)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_guidance_works_with_every_family(checkpoint: Checkpoint, name: str, case: str) -> None:
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    guidance = GUIDANCE[case](pipe)
    before, weights = dataclasses.asdict(guidance) if case != "weaker network" else {}, pipe.denoiser.state_dict()
    state = {key: tensor.clone() for key, tensor in weights.items()}
    attributes = {key: value for key, value in vars(pipe).items() if key != "_progress"}
    call = {**CALLS[name], "output_type": "pt"}
    first, second = (pipe(**call, guidance=guidance, generator=seeded(3)).images for _ in range(2))
    assert torch.equal(first, second), "the same call gives the same picture, so nothing is kept of the first"
    assert first.shape == (1, 3, 32, 32)
    assert first.isfinite().all()
    plain = pipe(**call, guidance=sfumato.NoGuidance(), generator=seeded(3)).images
    assert (first - plain).abs().max() > 1e-4
    assert before == (dataclasses.asdict(guidance) if before else {})
    assert all(torch.equal(state[key], tensor) for key, tensor in pipe.denoiser.state_dict().items())
    assert attributes == {key: value for key, value in vars(pipe).items() if key != "_progress"}


INACTIVE: dict[str, Callable[[], Any]] = {
    "scale of one": lambda: sfumato.ClassifierFreeGuidance(1.0),
    "original scale of zero": lambda: sfumato.ClassifierFreeGuidance(0.0, use_original_formulation=True),
    "projected": lambda: sfumato.APG(1.0),
    "tangential": lambda: sfumato.TCFG(1.0),
    "frequencies": lambda: sfumato.FDG([1.0, 1.0]),
    "no steps": lambda: sfumato.ClassifierFreeGuidance(5.0, start=0.5, stop=0.5),
    "perturbed by nothing": lambda: everywhere("PerturbedAttentionGuidance", guidance_scale=1.0, perturbed_guidance_scale=0.0),
    "never perturbed": lambda: sfumato.PAG(1.0, perturbed_guidance_start=0.9, perturbed_guidance_stop=0.95),
}


@pytest.mark.parametrize("case", INACTIVE)
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_inactive_guidance_costs_one_forward_a_step(checkpoint: Checkpoint, name: str, case: str) -> None:
    folder, reference = checkpoint(name)
    pipe = ours(folder, reference)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe(**TEXT, guidance=INACTIVE[case]())
    assert rows == [1] * TEXT["num_inference_steps"]


def test_what_each_step_evaluates(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    pipe = ours(folder, reference)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe(**TEXT, guidance=sfumato.PAG(5.0, perturbed_guidance_start=0.2, perturbed_guidance_stop=0.6))
    assert rows == [2, 2, 1, 2, 1, 2]  # steps 1 and 2 of 4 lie between 0.8 and 2.4
    rows.clear()
    pipe(**TEXT, guidance=sfumato.ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=2))
    assert rows == [2, 2]


def test_a_callback_sets_the_scale_under_perturbed_attention(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPAGPipeline")
    pipe = ours(folder, reference)
    seen: list[float] = []

    def stop(view: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(view.guidance_scale)
        view._guidance_scale = 0.0
        return tensors

    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe(**TEXT, callback_on_step_end=stop)
    assert seen == [7.5, 0.0, 0.0, 0.0]
    assert rows == [2, 1] + [1, 1] * 3


def test_weaker_network_is_the_papers_formula(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    pipe = ours(folder, reference)
    other = weaker(pipe.unet)
    call = {**TEXT, "num_inference_steps": 1, "output_type": "latent", "prompt_embeds": draw(1, (1, 77, 32)), "prompt": None}
    call["negative_prompt"] = None

    def final(scale: float, network: Any) -> torch.Tensor:
        guidance = sfumato.AutoGuidance(scale, network=network)
        return pipe(**call, guidance=guidance, generator=seeded(0)).images

    strong = pipe(**call, guidance=sfumato.NoGuidance(), generator=seeded(0)).images
    swapped = type(pipe)(**{**pipe.components, "unet": other}, requires_safety_checker=False)
    weak = swapped(**call, guidance=sfumato.NoGuidance(), generator=seeded(0)).images
    # one DDIM step is linear in the prediction
    torch.testing.assert_close(final(3.0, other), weak + 3 * (strong - weak), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"network is on cpu in torch\.float64"):
        final(3.0, weaker(pipe.unet).double())
    with pytest.raises(TypeError, match="is no network"):
        final(3.0, "small")


def test_the_weaker_network_of_a_steered_unet_can_be_a_unet_alone(checkpoint: Checkpoint) -> None:
    pipe, plain = ours(*checkpoint("StableDiffusionControlNetXSPipeline")), ours(*checkpoint("StableDiffusionPipeline"))
    for name in ("text_encoder", "tokenizer", "scheduler"):
        setattr(plain, name, getattr(pipe, name))
    call, edges = {"prompt": "a red cat", "num_inference_steps": 1, "height": 32, "width": 32}, {"image": tiny.picture(7)}

    def predictions(pipe: Any, guidance: Any, **more: Any) -> list[torch.Tensor]:
        return sfumato.evaluate(pipe, pipe.start(**call, **more, guidance=guidance, generator=seeded(0)).requests())

    weak, strong = predictions(pipe, sfumato.AutoGuidance(3.0, network=plain.unet), **edges)
    torch.testing.assert_close(strong, predictions(pipe, sfumato.NoGuidance(), **edges)[0])
    torch.testing.assert_close(weak, predictions(plain, sfumato.NoGuidance())[0])
    assert not torch.allclose(weak, strong, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sfumato.ClassifierFreeGuidance(float("nan")), "guidance_scale=nan"),
        (lambda: sfumato.ClassifierFreeGuidance(5.0, guidance_rescale=2.0), "guidance_rescale=2.0 must be a finite number in 0..1"),
        (lambda: sfumato.ClassifierFreeGuidance(5.0, start=0.8, stop=0.2), "start=0.8 must not lie above stop=0.2"),
        (lambda: sfumato.PAG(perturbed_guidance_stop=1.5), "perturbed_guidance_stop=1.5"),
        (lambda: sfumato.SLG(5.0, base=sfumato.APG()), "guidance_scale=5.0 is given beside base"),
        (lambda: sfumato.FDG([]), "guidance_scales is empty"),
        (lambda: sfumato.FDG([3.0], parallel_weights=[1.0, 0.5]), "parallel_weights has 2 values for 1"),
        (lambda: sfumato.ClassifierFreeZeroStarGuidance(zero_init_steps=-1), "zero_init_steps=-1"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_no_guidance_is_refused(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionPipeline")
    with pytest.raises(TypeError, match=r"guidance=5\.0 is no guidance"):
        ours(folder, reference)(**TEXT, guidance=5.0)
    with pytest.raises(ValueError, match=r"guidance_scale=5\.0 is given beside guidance"):
        ours(folder, reference)(**TEXT, guidance=sfumato.APG(), guidance_scale=5.0)
    with pytest.raises(TypeError, match=r"base=5\.0 is no guidance"):
        sfumato.PAG(base=5.0)


# --- FreeU ----------------------------------------------------------------------------------------------------------

FREEU = dict(s1=0.7, s2=0.4, b1=1.3, b2=1.6)


FREED = ("", "XL", "ControlNet", "ControlNetXS")


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", [f"StableDiffusion{kind}Pipeline" for kind in FREED])
def test_same_picture_with_freeu(tmp_path: Path, name: str, size: int) -> None:
    reference = tiny.build(name, tmp_path)
    pipe = ours(tmp_path, reference)
    call = {**CALLS[name], "height": size, "width": 32}
    plain = pipe(**call, generator=seeded(3)).images
    for each in (reference, pipe):
        each.enable_freeu(**FREEU)
    assert np.abs(assert_same(reference, pipe, **call) - plain).max() > 1e-3
    pipe.disable_freeu()
    assert np.array_equal(pipe(**call, generator=seeded(3)).images, plain)


def test_freeu_weighs_the_first_two_stages_alone(tmp_path: Path) -> None:
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3)
    network = tiny.unet(**blocks, block_out_channels=(16, 32, 32))
    network.save_pretrained(tmp_path)
    mine = sfumato.UNet2DConditionModel.from_pretrained(tmp_path)
    network.enable_freeu(**FREEU)
    inputs = (draw(0, (2, 4, 12, 20)), torch.tensor([10, 500]), draw(1, (2, 5, 32)))
    options = sfumato.models.layers.options.AttentionOptions(
        freeu=torch.tensor([[FREEU["s1"], FREEU["b1"]], [FREEU["s2"], FREEU["b2"]]]).expand(2, -1, -1)
    )
    with torch.no_grad():
        expected = network(*inputs).sample
        got = mine(*inputs, cross_attention_kwargs=options).sample
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_freeu_refuses_what_it_cannot_weigh(checkpoint: Checkpoint) -> None:
    folder, reference = checkpoint("StableDiffusionLatentUpscalePipeline")
    with pytest.raises(ValueError, match="FreeU acts on up blocks of convolutions"):
        ours(folder, reference).enable_freeu(**FREEU)
    folder, reference = checkpoint("StableDiffusionPipeline")
    with pytest.raises(ValueError, match="b1=None"):
        ours(folder, reference).enable_freeu(**{**FREEU, "b1": None})
