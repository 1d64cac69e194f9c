r"""The weighted prompt grammar that the AUTOMATIC1111 web interface made common.

``(words)`` weighs its content 1.1 times, ``[words]`` 1/1.1, ``(words:1.3)`` exactly 1.3; brackets nest and weights multiply.
``BREAK`` ends a chunk of tokens. ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` are the characters themselves. A bracket that is
never closed counts to the end of the prompt; one that was never opened is an ordinary character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP = 1.1
_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)


@dataclass(frozen=True)
class Segment:
    """A stretch of prompt with one weight; ``chunk_end`` marks a ``BREAK`` after it."""

    text: str
    weight: float = 1.0
    chunk_end: bool = False


def parse_prompt(prompt: str) -> list[Segment]:
    """Splits a prompt into weighted segments; the texts of neighbours differ in weight or are parted by a ``BREAK``.

    >>> parse_prompt("a (red:1.5) cat")
    [Segment(text='a ', weight=1.0, chunk_end=False), Segment(text='red', weight=1.5, chunk_end=False), \
Segment(text=' cat', weight=1.0, chunk_end=False)]
    """
    pieces: list[tuple[str, float, bool]] = []
    opened: list[tuple[str, int]] = []  # bracket, index of its first piece

    def scale(since: int, factor: float) -> None:
        pieces[since:] = [(text, weight * factor, end) for text, weight, end in pieces[since:]]

    for match in _TOKEN.finditer(prompt):
        token = match.group()
        inside_round = bool(opened) and opened[-1][0] == "("
        if token in "([":
            opened.append((token, len(pieces)))
        elif token == ")" and inside_round:
            scale(opened.pop()[1], STEP)
        elif token == "]" and opened and opened[-1][0] == "[":
            scale(opened.pop()[1], 1 / STEP)
        elif token.startswith(":") and token.endswith(")") and len(token) > 1 and inside_round:
            scale(opened.pop()[1], float(token[1:-1]))
        elif token == "BREAK":
            pieces.append(("", 1.0, True))
        else:
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0, False))
    for bracket, since in reversed(opened):
        scale(since, STEP if bracket == "(" else 1 / STEP)
    return _merge(pieces)


def _merge(pieces: list[tuple[str, float, bool]]) -> list[Segment]:
    segments: list[Segment] = []
    for text, weight, end in pieces:
        last = segments[-1] if segments else None
        if end:
            if last is None or last.chunk_end:
                segments.append(Segment("", 1.0, True))
            else:
                segments[-1] = Segment(last.text.rstrip(), last.weight, True)
        elif last is not None and not last.chunk_end and last.weight == weight:
            segments[-1] = Segment(last.text + text, weight)
        else:
            segments.append(Segment(text, weight))
    return segments
