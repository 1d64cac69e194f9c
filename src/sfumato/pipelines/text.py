"""From prompts to embeddings: CLIP and T5 text encoders, plainly or with weights, CLIP without a length limit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .prompts import parse_prompt

log = logging.getLogger(__name__)

# Fast tokenizers keep their padding and truncation in shared state: two threads inside one at once raise or mix settings.
_TOKENIZER_LOCK = threading.Lock()

SYNTAXES = ("plain", "weighted")


LAYERS = ("normalised", "penultimate", "last")
"""Which states of a CLIP text model a denoiser reads: the output; those before the last layer; the last layer's as they are."""


def encode_clip(
    tokenizer: Any, text_encoder: Any, prompts: list[str], clip_skip: int | None = None, syntax: str = "plain",
    length: int = 0, layer: str = "normalised",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Encodes prompts with a CLIP text model (arXiv:2103.00020).

    Args:
        tokenizer, text_encoder: A CLIP tokenizer and its ``CLIPTextModel``, perhaps with projection.
        prompts: One text per row.
        clip_skip: Layers to skip from the end; where the output is normalised that still applies.
        syntax: ``"plain"`` pads or cuts to the model's length, with a warning for what is cut; ``"weighted"`` reads the grammar of
            :mod:`sfumato.pipelines.prompts` and encodes any length in chunks.
        length: Least number of embeddings of the weighted result, so that it can stand beside another one.
        layer: Which states, one of ``LAYERS``.

    Returns:
        Embeddings ``(B, N, D)`` on the encoder's device, N = 77 for one chunk, and the pooled, or projected, ones ``(B, P)`` of the
        first chunk.
    """
    if syntax == "weighted":
        return _encode_weighted(tokenizer, text_encoder, prompts, clip_skip, length, layer)
    with _TOKENIZER_LOCK:
        limit = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    _warn_of_cut(tokenizer, prompts, limit)
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(text_encoder.device) if use_mask else None
    return _run_encoder(text_encoder, tokens.input_ids.to(text_encoder.device), mask, clip_skip, layer)


def encode_clips(
    parts: Sequence[tuple[Any, Any, list[str]]], clip_skip: int | None, syntax: str, length: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encodes prompts with several CLIP models, each (tokenizer, text encoder, prompts), before their last layers.

    Returns:
        Tokens side by side ``(B, N, D1 + D2 ...)``, and the pooled embeddings of each model ``(B, P)``.
    """
    found = [encode_clip(t, e, x, clip_skip, syntax, length, "penultimate") for t, e, x in parts]
    most = max(states.shape[1] for states, _ in found)
    if any(states.shape[1] < most for states, _ in found):  # weighted prompts of different lengths
        return encode_clips(parts, clip_skip, syntax, most)
    device = found[0][0].device
    return torch.cat([states.to(device) for states, _ in found], dim=-1), [pooled for _, pooled in found]


def _warn_of_cut(tokenizer: Any, prompts: list[str], limit: int) -> None:
    with _TOKENIZER_LOCK:
        whole = tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
        if whole.shape[1] > limit:
            cut = [text for text in tokenizer.batch_decode(whole[:, limit - 1 : -1], skip_special_tokens=True) if text]
            log.warning("the prompt is longer than %d tokens; left out: %s. Use prompt_syntax='weighted' to keep all.", limit, cut)


def _run_encoder(
    text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, clip_skip: int | None, layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    plain = layer == "normalised" and clip_skip is None
    out = text_encoder(ids, attention_mask=mask, output_hidden_states=not plain)
    pooled = out.text_embeds if "text_embeds" in out.keys() else out.pooler_output  # noqa: SIM118, not a dictionary
    if plain:
        return out.last_hidden_state, pooled
    states, skipped, before = out.hidden_states, clip_skip or 0, 2 if layer == "penultimate" else 1
    if not 0 <= skipped <= len(states) - before:
        raise ValueError(f"clip_skip={clip_skip} must lie in 0..{len(states) - before}, the layers of this text encoder")
    chosen = states[-before - skipped]
    if layer == "normalised":
        chosen = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(chosen)
    return chosen, pooled


def _encode_weighted(
    tokenizer: Any, text_encoder: Any, prompts: list[str], clip_skip: int | None, length: int, layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    limit = tokenizer.model_max_length
    rows = [_weighted_chunks(tokenizer, prompt, limit) for prompt in prompts]
    count = max(-(-length // limit), *(len(row) for row in rows))
    for row in rows:
        row.extend([_special(tokenizer, [], limit)] * (count - len(row)))
    device = text_encoder.device
    ids = torch.tensor([[ids for ids, _ in row] for row in rows], device=device)  # (B, chunks, limit)
    weights = torch.tensor([[w for _, w in row] for row in rows], device=device)
    encoded, pooled = (x.unflatten(0, ids.shape[:2]) for x in _run_encoder(text_encoder, ids.flatten(0, 1), None, clip_skip, layer))
    return _weigh(encoded, weights).flatten(1, 2), pooled[:, 0]


def _weigh(encoded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scales tokens (B, chunks, N, D) by weights (B, chunks, N).

    That shifts the mean of a chunk; it is brought back so that weights stress words and nothing else.
    """
    weights = weights.to(encoded.dtype).unsqueeze(-1)
    if not bool((weights != 1).any()):
        return encoded
    before = encoded.mean(dim=(2, 3), keepdim=True)
    scaled = encoded * weights
    changed = (weights != 1).any(dim=2, keepdim=True)
    return torch.where(changed, scaled * (before / scaled.mean(dim=(2, 3), keepdim=True)), encoded)


def encode_t5(tokenizer: Any, text_encoder: Any, prompts: list[str], length: int, syntax: str = "plain") -> torch.Tensor:
    """Encodes prompts with a T5 encoder (arXiv:1910.10683).

    Args:
        tokenizer, text_encoder: A T5 tokenizer and its ``T5EncoderModel``.
        prompts: One text per row.
        length: Number of tokens: shorter prompts are padded, longer ones cut, with a warning.
        syntax: As for :func:`encode_clip`; weights scale the tokens, and ``BREAK`` has no meaning here.

    Returns:
        Embeddings ``(B, length, D)`` on the encoder's device.
    """
    device = next(text_encoder.parameters()).device
    if syntax == "plain":
        with _TOKENIZER_LOCK:
            ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        _warn_of_cut(tokenizer, prompts, length)
        return text_encoder(ids.to(device))[0]
    rows: list[list[tuple[int, float]]] = []
    for prompt in prompts:
        pairs: list[tuple[int, float]] = []
        for segment in parse_prompt(prompt):
            with _TOKENIZER_LOCK:
                found = tokenizer(segment.text, add_special_tokens=False, padding=False, truncation=False).input_ids
            pairs += [(token, segment.weight) for token in found]
        if len(pairs) > length - 1:
            log.warning("the prompt is longer than %d tokens; its end is left out: raise max_sequence_length", length)
        pairs = [*pairs[: length - 1], (tokenizer.eos_token_id, 1.0)]
        rows.append(pairs + [(tokenizer.pad_token_id, 1.0)] * (length - len(pairs)))
    ids = torch.tensor([[token for token, _ in row] for row in rows], device=device)
    weights = torch.tensor([[weight for _, weight in row] for row in rows], device=device)
    return _weigh(text_encoder(ids)[0].unsqueeze(1), weights.unsqueeze(1)).squeeze(1)


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
