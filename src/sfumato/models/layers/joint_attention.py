"""Attention over text and image tokens together, and the blocks around it (MMDiT, arXiv:2403.03206, section 4, figure 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attend
from .compute import GELULinear, Linear, RMSNorm
from .modulation import Modulation, add_gated, modulated, within_float16
from .options import NO_OPTIONS, AttentionOptions, blur_queries, joint_region_mask
from .processors import Processable
from .rope import rotate


class Joint(NamedTuple):
    """What the blocks of one forward pass share. Tokens stand in the order text, image, whichever of them a layer sees."""

    condition: torch.Tensor  # (B, C) of time and pooled text, activated
    image_tokens: int
    size: tuple[int, int] | None = None  # height and width of the picture in tokens, where options need it
    rope: torch.Tensor | None = None  # of all tokens, from `rope_table`
    mask: torch.Tensor | None = None  # (B, 1, S, S), true where a token may look
    options: AttentionOptions = NO_OPTIONS  # of this call


def regions_within(
    options: AttentionOptions, size: tuple[int, int] | None, text: int, image: int, before: int = 0
) -> torch.Tensor | None:
    """The mask that keeps prompts to their regions, (B, 1, S, S) with S = before + text + image; ``None`` without regions.

    Tokens ``before`` the text, and image tokens after the first height * width, those of other pictures, see all and are seen
    by all.
    """
    if options.regions is None or size is None:
        return None
    mask, after = joint_region_mask(options.regions, *size, text), image - size[0] * size[1]
    return F.pad(mask, (before, after, before, after), value=True)


class _Widening(nn.Module):
    """The first layer of :class:`FeedForward`, one level deeper because the checkpoint's names are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = GELULinear(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """The transformer's two-layer network with GELU, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Widening(dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, N, dim)`` -> the same."""
        return self.net(x)


class JointAttention(nn.Module, Processable):
    """Multi-head attention over text and image tokens, each with projections of their own.

    Args:
        dim, heads, dim_head: Width of the tokens, number of heads, width of each.
        qk_norm: Normalise queries and keys (arXiv:2302.05442).
        text: Have projections for text tokens.
        text_out: Have an output for them too; without one they are only looked at.
        out: Have an output projection.
    """

    attention_backend = "native"
    fused_projections = False  # callers' processors ask for this

    def __init__(
        self, dim: int, heads: int, dim_head: int, *, qk_norm: bool, text: bool = True, text_out: bool = True, out: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, inner = heads, dim_head, heads * dim_head
        self.to_q, self.to_k, self.to_v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.to_out = nn.Sequential(Linear(inner, dim), nn.Identity()) if out else nn.Identity()
        self.norm_q, self.norm_k = (RMSNorm(dim_head, 1e-6) if qk_norm else None for _ in range(2))
        self.to_add_out: nn.Module | None = None
        self.processor: nn.Module | None = None  # attention to picture prompts, while an IP-Adapter is loaded
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
            self.norm_added_q, self.norm_added_k = (RMSNorm(dim_head, 1e-6) if qk_norm else None for _ in range(2))
            self.to_add_out = Linear(inner, dim) if text_out else None
        self.context_pre_only, self.added_kv_proj_dim = self.to_add_out is None, dim if text else None  # this too

    def forward(self, x: torch.Tensor, text: torch.Tensor | None, joint: Joint) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` (B, N, C) and ``text`` (B, M, C), already in ``x`` if it is ``None`` -> what each of them found.

        A caller's processor that stands in place of the computation gets the mask and the rotary positions, no other options.
        """
        if self.custom_processor is None:
            return self._found(x, text, joint)
        given: dict[str, Any] = {"encoder_hidden_states": text, "attention_mask": joint.mask}
        if joint.rope is not None:  # (..., S, 1, D / 2, 2) -> cosines and sines (..., S, D), as processors know them
            given["image_rotary_emb"] = tuple(part.squeeze(-2).repeat_interleave(2, dim=-1) for part in joint.rope.unbind(-1))
        found: Any = self.custom_processor(self, x, **given)
        from_image, from_text = found if isinstance(found, tuple) else (found, None)
        return from_image, None if self.to_add_out is None else from_text

    def own_forward(
        self, x: torch.Tensor, text: torch.Tensor | None = None, mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """What the layer computes of a processor's arguments: of the image, and of the text where it is given."""
        parts = None if image_rotary_emb is None else [part[..., ::2] for part in image_rotary_emb]
        rope = None if parts is None else torch.stack(parts, dim=-1).unsqueeze(-3)  # (..., S, D) each -> (..., S, 1, D / 2, 2)
        found = self._found(x, text, Joint(x, 0, rope=rope, mask=mask))  # a condition is for blocks alone
        return found[0] if text is None else found

    def _found(self, x: torch.Tensor, text: torch.Tensor | None, joint: Joint) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (self._heads(x, projection) for projection in (self.to_q, self.to_k, self.to_v))
        prompted = None
        if self.processor is not None and self.processor.joined and joint.options.image_times:
            prompted = self.processor(query, key, value, joint, self._attend)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if text is not None:
            key = torch.cat([self._heads(text, self.add_k_proj, self.norm_added_k), key], dim=1)
            value = torch.cat([self._heads(text, self.add_v_proj), value], dim=1)
            if self.to_add_out is not None:
                query = torch.cat([self._heads(text, self.add_q_proj, self.norm_added_q), query], dim=1)
        from_text, from_image = self._attend(query, key, value, joint).tensor_split([-x.shape[1]], dim=1)
        from_image = from_image if prompted is None else from_image + prompted
        return self.to_out(from_image), None if text is None or self.to_add_out is None else self.to_add_out(from_text)

    def picture_prompts(self, x: torch.Tensor, joint: Joint) -> torch.Tensor | None:
        """What the picture prompts of FLUX's IP-Adapters add to image tokens (B, N, C); ``None`` without any."""
        if self.processor is None or self.processor.joined or not joint.options.image_tokens:
            return None
        return self.processor(self._heads(x, self.to_q, self.norm_q).flatten(2), self.heads, joint.options, joint.size)

    def _heads(self, x: torch.Tensor, projection: nn.Module, norm: nn.Module | None = None) -> torch.Tensor:
        """``(B, N, C)`` -> ``(B, N, heads, D)``."""
        x = projection(x).unflatten(2, (self.heads, -1))
        return x if norm is None else norm(x)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, joint: Joint) -> torch.Tensor:
        """Attends from (B, N, heads, D), the last N of all S tokens, to (B, S, heads, D) -> (B, N, C)."""
        if joint.rope is not None:
            key, query = rotate(key, joint.rope), rotate(query, joint.rope[..., -query.shape[1] :, :, :, :])
        text = key.shape[1] - joint.image_tokens
        mask = joint.mask if text else None
        if joint.options.perturbs(self, "identity"):
            alone = _identity_mask(text, joint.image_tokens, query.device)
            mask = alone if mask is None else mask & alone
        if mask is not None:
            mask = mask[..., -query.shape[1] :, :]
        query = query.flatten(2)
        if joint.options.perturbs(self, "blur"):
            query = _blurred(query, joint)
        return attend(query, key.flatten(2), value.flatten(2), self.heads, mask, self.attention_backend)


def _identity_mask(text: int, image: int, device: torch.device) -> torch.Tensor:
    """(S, S): image tokens look at the text and at themselves alone, which is PAG (arXiv:2403.17377) for joint attention."""
    mask = torch.ones(text + image, text + image, dtype=torch.bool, device=device)
    mask[text:, text:] = torch.eye(image, dtype=torch.bool, device=device)
    return mask


def _blurred(query: torch.Tensor, joint: Joint) -> torch.Tensor:
    """Blurs the queries of the picture, which blurs its attention (SEG, arXiv:2408.00760, section 4)."""
    assert joint.size is not None and joint.options.perturbation is not None
    pixels = joint.size[0] * joint.size[1]
    text, image, others = query.split([query.shape[1] - joint.image_tokens, pixels, joint.image_tokens - pixels], dim=1)
    return torch.cat([text, blur_queries(image, *joint.size, joint.options.perturbation.blur_sigma), others], dim=1)


class JointBlock(nn.Module):
    """Joint attention and feed-forward of two streams of tokens, each modulated, gated and added.

    Args:
        dim, heads, dim_head, qk_norm: As in :class:`JointAttention`.
        text: Have a stream of text tokens.
        text_out: Carry it on; the last block of Stable Diffusion 3 does not.
        dual: Have a second attention among the image tokens alone, as Stable Diffusion 3.5 medium.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, *, qk_norm: bool, text: bool = True, text_out: bool = True, dual: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 6 if text_out else 2) if text else None
        self.attn = JointAttention(dim, heads, dim_head, qk_norm=qk_norm, text=text, text_out=text_out)
        self.attn2 = JointAttention(dim, heads, dim_head, qk_norm=qk_norm, text=False) if dual else None
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim) if text and text_out else None

    def forward(self, x: torch.Tensor, text: torch.Tensor | None, joint: Joint) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image tokens (B, N, C) and text tokens (B, M, C) -> the same; no text where the block does not carry it on."""
        shift, scale, gate, *rest = self.norm1(joint.condition)
        text_in, text_rest = None, []
        if self.norm1_context is not None and text is not None:
            text_shift, text_scale, *text_rest = self.norm1_context(joint.condition)
            if self.ff_context is None:  # such a block has them the other way round
                text_shift, text_scale = text_scale, text_shift
            text_in = modulated(text, text_shift, text_scale)
        image_in = modulated(x, shift, scale)
        prompted = self.attn.picture_prompts(image_in, joint)
        out, text_out = self.attn(image_in, text_in, joint)
        mixed = add_gated(x, gate, out)
        if self.attn2 is not None:
            shift, scale, gate = rest[3:]
            mixed = add_gated(mixed, gate, self.attn2(modulated(x, shift, scale), None, joint)[0])
        x = _fed(mixed, self.ff, *rest[:3])
        x = x if prompted is None else x + prompted
        if self.ff_context is None or text is None or text_out is None:
            return x, None
        text = add_gated(text, text_rest[0], text_out)
        return x, within_float16(_fed(text, self.ff_context, *text_rest[1:]))


def _fed(x: torch.Tensor, ff: nn.Module, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return add_gated(x, gate, ff(modulated(x, shift, scale)))
