"""FLUX.1 Redux against the reference: pictures as prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import transformers
from test_pipelines import CALLS, Checkpoint, seeded

import sfumato


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The reference's pipeline and ours, from the same folder."""
    folder = tmp_path_factory.mktemp("redux")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
        words, (tokens, second) = tiny.tokenizer(folder / "words"), tiny.t5(32)
        reference = diffusers.FluxPriorReduxPipeline(
            image_encoder=transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)).eval(),
            feature_extractor=transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
            image_embedder=diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(redux_dim=16, txt_in_features=32),
            text_encoder=tiny.text_encoder(len(words)), tokenizer=words, text_encoder_2=second, tokenizer_2=tokens,
        )  # fmt: skip
    reference.save_pretrained(folder / "pipe")
    return reference, sfumato.FluxPriorReduxPipeline.from_pretrained(folder / "pipe")


def assert_same(reference: Any, ours: Any, **call: Any) -> None:
    with torch.no_grad():
        expected = reference(**call)
    for name, got in zip(("prompt_embeds", "pooled_prompt_embeds"), ours(**call), strict=True):
        torch.testing.assert_close(got, expected[name], atol=1e-5, rtol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "one picture": {"image": tiny.picture(), "prompt": ""},
    "with a text": {"image": tiny.picture(), "prompt": "a red cat", "prompt_2": "blue"},
    "two blended": {
        "image": [tiny.picture(1), tiny.picture(2)], "prompt": ["a", "red"], "prompt_embeds_scale": [0.3, 0.7],
        "pooled_prompt_embeds_scale": [0.6, 0.4],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_prompts(pair: tuple[Any, Any], case: str) -> None:
    assert_same(*pair, **CASES[case])


def test_without_text_encoders(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    parts = {name: getattr(ours, name) for name in ("image_encoder", "feature_extractor", "image_embedder")}
    alone = sfumato.FluxPriorReduxPipeline(**parts)
    found = alone(tiny.picture())
    assert found.prompt_embeds.shape == (1, 512 + 16, 32) and found.pooled_prompt_embeds.shape == (1, 768)
    assert not found.prompt_embeds[:, :512].any() and not found.pooled_prompt_embeds.any()
    with pytest.raises(ValueError, match="has no text encoders"):
        alone(tiny.picture(), prompt="a cat")
    with pytest.raises(ValueError, match="1 scales for 2 pictures"):
        alone([tiny.picture(), tiny.picture()], prompt_embeds_scale=[1.0])


def test_what_it_makes_is_a_prompt_of_flux(pair: tuple[Any, Any], checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("FluxPipeline")
    pipe: Any = sfumato.FluxPipeline.from_pretrained(Path(folder))
    call = {k: v for k, v in CALLS["FluxPipeline"].items() if k not in ("prompt", "negative_prompt")}
    pictures = [pipe(**pair[1](tiny.picture(k)), **call, generator=seeded(1)).images for k in (1, 2)]
    assert pictures[0].shape == (1, 32, 32, 3) and abs(pictures[0] - pictures[1]).max() > 1e-4
