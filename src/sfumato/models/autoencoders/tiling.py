"""Slicing and tiling: encoding and decoding large batches and large pictures in pieces, to bound memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

Piece = Callable[[torch.Tensor], torch.Tensor]


class TilingMixin:
    """Switches of an autoencoder that can work in pieces.

    Attributes:
        use_slicing: Encode and decode one picture of a batch at a time. Exact.
        use_tiling: Encode and decode large pictures in overlapping tiles. Nearly exact: tiles do not see each other.
    """

    use_slicing: bool = False
    use_tiling: bool = False

    def enable_slicing(self) -> None:
        """Encodes and decodes one picture of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Undoes :meth:`enable_slicing`."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encodes and decodes large pictures in overlapping tiles."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Undoes :meth:`enable_tiling`."""
        self.use_tiling = False

    def sliced(self, work: Piece, x: torch.Tensor) -> torch.Tensor:
        """Calls ``work`` on the batch, or on one sample at a time when slicing is on."""
        return torch.cat([work(sample) for sample in x.split(1)]) if self.use_slicing and x.shape[0] > 1 else work(x)


def blend(before: torch.Tensor, after: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    """Fades the end of one tile into the start of the next.

    The first ``extent`` rows or columns of ``after`` (less where a tile is smaller) become
    ``(1 - i/extent) before + i/extent after``.
    """
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    shape = [1] * after.dim()
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device) / extent).to(after.dtype).view(shape)
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([end * (1 - weight) + start * weight, rest], dim=dim)


def tile_and_fade(x: torch.Tensor, work: Piece, tile: int, step: int, fade: int, keep: int) -> torch.Tensor:
    """Works on overlapping tiles; each fades into its neighbours above and to the left and gives its first part.

    ``x`` (B, C, H, W) is cut every ``step`` into tiles of edge ``tile``; ``fade`` and ``keep`` are measured in the result: the
    width of the fade, and the edge of what each tile gives.
    """
    rows: list[list[torch.Tensor]] = []
    for top in range(0, x.shape[-2], step):
        row: list[torch.Tensor] = []
        for column, left in enumerate(range(0, x.shape[-1], step)):
            piece = work(x[..., top : top + tile, left : left + tile])
            if rows:
                piece = blend(rows[-1][column], piece, fade, -2)
            if row:
                piece = blend(row[-1], piece, fade, -1)
            row.append(piece)
        rows.append(row)
    return torch.cat([torch.cat([piece[..., :keep, :keep] for piece in row], dim=-1) for row in rows], dim=-2)


def tile_and_paste(x: torch.Tensor, work: Piece, tile: int, overlap: int, resize: Callable[[int], int]) -> torch.Tensor:
    """Works on overlapping tiles, pasting each over the result with a ramp from 0 to 1 across the overlap.

    ``tile`` and ``overlap`` are measured in ``x`` (B, C, H, W); ``resize`` turns such a length into one of the result.
    """
    ramp = torch.linspace(0, 1, resize(overlap), device=x.device, dtype=x.dtype)
    height, width = x.shape[-2:]
    result: torch.Tensor | None = None
    for top in range(0, height, tile - overlap):
        for left in range(0, width, tile - overlap):
            piece = work(x[..., top : top + tile, left : left + tile])
            if result is None:
                result = piece.new_zeros(*piece.shape[:2], resize(height), resize(width))
            weight = torch.ones_like(piece[:1, :1])
            if top:
                edge = min(len(ramp), piece.shape[-2])
                weight[..., :edge, :] *= ramp[:edge, None]
            if left:
                edge = min(len(ramp), piece.shape[-1])
                weight[..., :edge] *= ramp[:edge]
            place = result[..., resize(top) :, resize(left) :][..., : piece.shape[-2], : piece.shape[-1]]
            place.copy_(weight * piece + (1 - weight) * place)
    assert result is not None
    return result
