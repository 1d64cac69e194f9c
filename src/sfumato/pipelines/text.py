"""From prompts to embeddings: CLIP text encoders, plainly or with weights and without a length limit."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from .prompts import parse_prompt

log = logging.getLogger(__name__)

# Fast tokenizers keep their padding and truncation in shared state: two threads inside one at once raise or mix settings.
_TOKENIZER_LOCK = threading.Lock()

SYNTAXES = ("plain", "weighted")


def encode_clip(
    tokenizer: Any,
    text_encoder: Any,
    prompts: list[str],
    clip_skip: int | None = None,
    syntax: str = "plain",
    length: int | None = None,
) -> torch.Tensor:
    """Encodes prompts with a CLIP text model (arXiv:2103.00020).

    Args:
        tokenizer, text_encoder: A CLIP tokenizer and its ``CLIPTextModel``.
        prompts: One text per row.
        clip_skip: Layers to skip from the end; the final normalisation still applies.
        syntax: ``"plain"`` pads or cuts to the model's length, with a warning for what is cut; ``"weighted"`` reads the grammar of
            :mod:`sfumato.pipelines.prompts` and encodes any length in chunks.
        length: Least number of embeddings of the weighted result, so that it can stand beside another one.

    Returns:
        Embeddings ``(B, N, D)`` on the encoder's device, N = 77 for one chunk.
    """
    if syntax == "weighted":
        return _encode_weighted(tokenizer, text_encoder, prompts, clip_skip, length or 0)
    with _TOKENIZER_LOCK:
        limit = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        whole = tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
        if whole.shape[1] > limit:
            cut = [text for text in tokenizer.batch_decode(whole[:, limit - 1 : -1], skip_special_tokens=True) if text]
            log.warning("the prompt is longer than %d tokens; left out: %s. Use prompt_syntax='weighted' to keep all.", limit, cut)
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(text_encoder.device) if use_mask else None
    return _run_encoder(text_encoder, tokens.input_ids.to(text_encoder.device), mask, clip_skip)


def _run_encoder(text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, clip_skip: int | None) -> torch.Tensor:
    if clip_skip is None:
        return text_encoder(ids, attention_mask=mask)[0]
    states = text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    if not 0 <= clip_skip < len(states):
        raise ValueError(f"clip_skip={clip_skip} must lie in 0..{len(states) - 1}, the layers of this text encoder")
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states[-(clip_skip + 1)])


def _encode_weighted(tokenizer: Any, text_encoder: Any, prompts: list[str], clip_skip: int | None, length: int) -> torch.Tensor:
    limit = tokenizer.model_max_length
    rows = [_weighted_chunks(tokenizer, prompt, limit) for prompt in prompts]
    count = max(-(-length // limit), *(len(row) for row in rows))
    for row in rows:
        row.extend([_special(tokenizer, [], limit)] * (count - len(row)))
    device = text_encoder.device
    ids = torch.tensor([[ids for ids, _ in row] for row in rows], device=device)  # (B, chunks, limit)
    weights = torch.tensor([[w for _, w in row] for row in rows], device=device)
    encoded = _run_encoder(text_encoder, ids.flatten(0, 1), None, clip_skip).unflatten(0, ids.shape[:2])  # (B, chunks, limit, D)
    weights = weights.to(encoded.dtype).unsqueeze(-1)
    if bool((weights != 1).any()):
        # Scaling tokens shifts the mean of a chunk; it is brought back so that weights stress words and nothing else.
        before = encoded.mean(dim=(2, 3), keepdim=True)
        scaled = encoded * weights
        changed = (weights != 1).any(dim=2, keepdim=True)
        encoded = torch.where(changed, scaled * (before / scaled.mean(dim=(2, 3), keepdim=True)), encoded)
    return encoded.flatten(1, 2)


def _weighted_chunks(tokenizer: Any, prompt: str, limit: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of a prompt, in chunks with start and end marks, ``limit`` long."""
    chunks: list[tuple[list[int], list[float]]] = []
    pending: list[tuple[int, float]] = []

    def close() -> None:
        chunks.append(_special(tokenizer, pending, limit))
        pending.clear()

    for segment in parse_prompt(prompt):
        with _TOKENIZER_LOCK:
            ids = tokenizer(segment.text, add_special_tokens=False, padding=False, truncation=False).input_ids
        for token in ids:
            if len(pending) == limit - 2:
                close()
            pending.append((token, segment.weight))
        if segment.chunk_end:
            close()
    if pending or not chunks:
        close()
    return chunks


def _special(tokenizer: Any, tokens: list[tuple[int, float]], limit: int) -> tuple[list[int], list[float]]:
    padding = limit - 2 - len(tokens)
    ids = [tokenizer.bos_token_id, *(t for t, _ in tokens), tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
    return ids, [1.0, *(w for _, w in tokens), *[1.0] * (padding + 1)]


def encode_clip_pooled(tokenizer: Any, text_encoder: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts to the last layer's states before the final normalisation (B, 77, D), and the pooled embedding (B, D)."""
    limit = tokenizer.model_max_length
    with _TOKENIZER_LOCK:
        tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    out = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
    return out.hidden_states[-1], out.pooler_output
