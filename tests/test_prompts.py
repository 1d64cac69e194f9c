"""The weighted prompt grammar, and encoding with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfumato
from sfumato.pipelines.prompts import Segment, parse_prompt
from sfumato.pipelines.text import encode_clip

CASES = {
    "plain text": [("plain text", 1.0)],
    "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
    "a ((red)) cat": [("a ", 1.0), ("red", 1.21), (" cat", 1.0)],
    "a [red] cat": [("a ", 1.0), ("red", 1 / 1.1), (" cat", 1.0)],
    "a (red:1.5) cat": [("a ", 1.0), ("red", 1.5), (" cat", 1.0)],
    "(a (red:2) cat:0.5)": [("a ", 0.5), ("red", 1.0), (" cat", 0.5)],
    r"a \(red\) cat": [("a (red) cat", 1.0)],
    "a (red": [("a ", 1.0), ("red", 1.1)],
    "a) red]": [("a) red]", 1.0)],
    "time: 12:30": [("time: 12:30", 1.0)],
    "": [],
}


@pytest.mark.parametrize("prompt", CASES)
def test_grammar(prompt: str) -> None:
    got = [(s.text, s.weight) for s in parse_prompt(prompt)]
    assert [t for t, _ in got] == [t for t, _ in CASES[prompt]]
    assert [w for _, w in got] == pytest.approx([w for _, w in CASES[prompt]])


def test_break_ends_a_chunk() -> None:
    assert parse_prompt("red BREAK cat") == [Segment("red", 1.0, True), Segment(" cat", 1.0)]
    assert "BREAKFAST" in parse_prompt("BREAKFAST")[0].text


@given(st.text(alphabet="ab ,", max_size=40))
def test_text_without_signs_is_one_segment(text: str) -> None:
    assert parse_prompt(text) == ([Segment(text)] if text else [])


@given(st.text(alphabet="ab()[]:\\1.5 ", max_size=40))
def test_every_prompt_parses_and_loses_no_letter(text: str) -> None:
    segments = parse_prompt(text)
    assert re.sub("[^ab]", "", "".join(s.text for s in segments)) == re.sub("[^ab]", "", text)


@given(st.recursive(st.text("ab ", min_size=1, max_size=6).map(lambda t: (t, t, 1)),
                    lambda inner: inner.map(lambda p: (f"({p[0]})", p[1], p[2] + 1)), max_leaves=4))  # fmt: skip
def test_nesting_multiplies(nested: tuple[str, str, int]) -> None:
    prompt, text, depth = nested
    (segment,) = parse_prompt(prompt)
    assert segment.text == text
    assert segment.weight == pytest.approx(1.1 ** (depth - 1))


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[[str], tuple[Path, Any]]) -> Any:
    folder, _ = checkpoint("StableDiffusionPipeline")
    made = sfumato.StableDiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def encode(pipe: Any, *prompts: str, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return encode_clip(pipe.tokenizer, pipe.text_encoder, list(prompts), **options)[0]


def test_short_unweighted_prompt_encodes_the_same_in_both_syntaxes(pipe: Any) -> None:
    assert torch.equal(encode(pipe, "a red cat", "blue"), encode(pipe, "a red cat", "blue", syntax="weighted"))


def test_long_prompts_keep_every_word(pipe: Any) -> None:
    long = "red cat " * 60
    encoded = encode(pipe, long, "cat", syntax="weighted")
    assert encoded.shape[:2] == (2, 77 * 2)
    changed = encode(pipe, long + " blue", "cat", syntax="weighted")
    assert not torch.equal(encoded, changed)
    assert torch.equal(encoded[1], changed[1])


def test_long_plain_prompt_warns_of_what_is_cut(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    encode(pipe, "red " * 90 + "blue")
    assert "blue" in caplog.text and "weighted" in caplog.text


def test_weights_scale_tokens_and_keep_the_mean(pipe: Any) -> None:
    plain = encode(pipe, "a red cat", syntax="weighted")
    heavy = encode(pipe, "a (red:1.5) cat", syntax="weighted")
    torch.testing.assert_close(heavy.mean(), plain.mean(), atol=1e-5, rtol=1e-4)
    ratio = (heavy / plain)[0].median(dim=1).values  # by token: start, a, red, cat, end, ...
    assert float(ratio[2] / ratio[0]) == pytest.approx(1.5, rel=1e-4)
    assert float(ratio[3] / ratio[0]) == pytest.approx(1.0, rel=1e-4)


def test_long_prompt_against_short_negative(pipe: Any) -> None:
    options = dict(num_inference_steps=2, output_type="np", prompt_syntax="weighted")
    for prompt, negative in (("red cat " * 60, "blue"), ("red", "blue cat " * 60)):
        images = pipe(prompt, negative_prompt=negative, generator=torch.Generator().manual_seed(0), **options).images
        assert np.isfinite(images).all()
