"""The CLIP text encoder against ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from sfumato.models.text_encoders.clip import CLIPTextModel

IDS = torch.tensor([[258, 5, 9, 17, 259, 259], [258, 1, 259, 259, 259, 259]])
VARIANTS: dict[str, dict[str, Any]] = {
    "quick_gelu": {},
    "gelu": dict(hidden_act="gelu"),
    "first checkpoints' end token": dict(eos_token_id=2),
}


def load(model: Any, folder: Path) -> CLIPTextModel:
    model.save_pretrained(folder)
    return CLIPTextModel.from_pretrained(folder)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_states(variant: str, masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = tiny.text_encoder(260, **VARIANTS[variant])
    ours = load(reference, tmp_path)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]) if masked else None
    with torch.no_grad():
        expected = reference(IDS, attention_mask=mask, output_hidden_states=True)
        got = ours(IDS, attention_mask=mask, output_hidden_states=True)
    keep = mask.bool() if masked else torch.ones_like(IDS, dtype=torch.bool)  # states of masked tokens mean nothing
    torch.testing.assert_close(got[0][keep], expected[0][keep], atol=1e-5, rtol=1e-5)
    if not masked:
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[keep], b[keep], atol=1e-5, rtol=1e-5)


def test_transformers_loads_what_we_save(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = tiny.text_encoder(260)
    load(reference, tmp_path / "a").save_pretrained(tmp_path / "b")
    again, report = transformers.CLIPTextModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS)[0], reference(IDS)[0])
    from_scratch = CLIPTextModel(
        **{k: v for k, v in load(reference, tmp_path / "a").config.items() if k in CLIPTextModel._init_parameters()}
    )
    from_scratch.save_pretrained(tmp_path / "c")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "c").model_type == "clip_text_model"


def test_older_names_load(tmp_path: Path) -> None:
    """Checkpoints of earlier years have ``text_model.`` before each name, and position ids."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    reference = tiny.text_encoder(260)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    with torch.no_grad():
        torch.testing.assert_close(CLIPTextModel.from_pretrained(tmp_path)(IDS)[0], reference(IDS)[0], atol=1e-5, rtol=1e-5)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPTextModel(hidden_act="relu")
