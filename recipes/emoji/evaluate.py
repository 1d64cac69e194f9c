"""Measures a model on the pairs that it never saw, by a classifier of styles and concepts trained on the real drawings."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from concepts import CORE, HELD_OUT, STYLES
from PIL import Image, ImageDraw
from prepare import Drawing, read_pack
from torch import nn

import sfumato
from sfumato.cli.generate import embedded_defaults
from sfumato.training.components import as_bytes
from sfumato.training.sampling import generator

EDGE, BATCH = 48, 64
GROUPS = ("food-drink", "animals-nature", "activities")


class Classifier(nn.Module):
    """Five convolutions with two heads."""

    def __init__(self, styles: int, concepts: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 96), (96, 192)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(192, 256, 3), nn.SiLU(), nn.Flatten())
        self.style, self.concept = nn.Linear(256, styles), nn.Linear(256, concepts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, 48, 48) in -1..1 -> logits (B, styles), (B, concepts)."""
        features = self.body(x)
        return self.style(features), self.concept(features)


def disturbed(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Moves, scales, turns, mirrors nothing, blurs, tints and grains pictures, so that the classifier looks at what matters."""
    count = len(x)
    angle = (torch.rand(count, generator=draw) - 0.5) * 0.4
    scale = 1 + (torch.rand(count, generator=draw) - 0.5) * 0.4
    shift = (torch.rand(count, 2, generator=draw) - 0.5) * 0.25
    turn = torch.stack([angle.cos() * scale, -angle.sin() * scale, angle.sin() * scale, angle.cos() * scale], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[..., None]], 2), list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1  # what comes in from outside is white
    if torch.rand((), generator=draw) < 0.5:
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    tint = 1 + 0.2 * (torch.rand(count, 3, 1, 1, generator=draw) - 0.5)
    return x * tint + 0.08 * torch.randn(x.shape, generator=draw)


def tensors(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as the classifier takes them."""
    return as_bytes(pictures, (EDGE, EDGE)).float() / 127.5 - 1


def train_classifier(drawings: list[Drawing], concepts: list[str], steps: int) -> Classifier:
    """Trains on the real drawings of ``concepts``."""
    chosen = [(m, Image.open(io.BytesIO(data)).convert("RGB")) for m, data in drawings if m["label"] in set(concepts)]
    x = tensors([picture for _, picture in chosen])
    style = torch.tensor([STYLES.index(m["style"]) for m, _ in chosen])
    concept = torch.tensor([concepts.index(m["label"]) for m, _ in chosen])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(len(STYLES), len(concepts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        draw = generator(0, "classifier", step)
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        styles, names = model(disturbed(x[rows], draw))
        (F.cross_entropy(styles, style[rows]) + F.cross_entropy(names, concept[rows], label_smoothing=0.05)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracies(
    model: Classifier, pictures: list[Image.Image], pairs: list[tuple[str, str]], concepts: list[str]
) -> dict[str, float]:
    """Shares of pictures whose style is named right, and whose concept is among the first five (and the first)."""
    styles, names = model(tensors(pictures))
    style = torch.tensor([STYLES.index(s) for _, s in pairs])
    concept = torch.tensor([concepts.index(c) for c, _ in pairs])
    best = names.topk(min(5, len(concepts)), dim=1).indices == concept[:, None]
    return {
        "style": (styles.argmax(1) == style).float().mean().item(),
        "concept_top5": best.any(1).float().mean().item(),
        "concept_top1": best[:, 0].float().mean().item(),
    }


def through_autoencoder(pipe: sfumato.StableDiffusionPipeline, pictures: list[Image.Image], edge: int) -> list[Image.Image]:
    """Pictures after encoding and decoding: what the denoiser could reach at best."""
    x = as_bytes(pictures, (edge, edge)).float() / 127.5 - 1
    with torch.no_grad():
        return pipe.image_processor.postprocess(pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample)


def nearest(pictures: list[Image.Image], known: list[Image.Image], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances, root mean square over 32 x 32 pixels in 0..1, to the ``count`` nearest of ``known``, and which they are."""
    a, b = (as_bytes(p, (32, 32)).flatten(1).float() / 255 for p in (pictures, known))
    distance = torch.cdist(a, b) / a.shape[1] ** 0.5
    found = distance.topk(count, largest=False)
    return found.values.numpy(), found.indices.numpy()


def sheet(rows: list[tuple[str, list[Image.Image]]], path: Path, cell: int = 72) -> None:
    """Rows of a label and pictures."""
    width, margin = max(len(pictures) for _, pictures in rows), 150
    canvas = Image.new("RGB", (margin + cell * width, cell * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (label, pictures) in enumerate(rows):
        draw.text((4, cell * y + cell // 2 - 6), label, fill="black")
        for x, picture in enumerate(pictures):
            canvas.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (margin + cell * x, cell * y))
    canvas.save(path)


def evaluate(model: Path, pack: Path, folder: Path, concepts: tuple[str, ...] | None, steps: int) -> dict[str, object]:
    """Makes a picture of each held-out pair, the first seed, and measures.

    Args:
        model: Pipeline folder.
        pack: Folder of the drawings.
        folder: To write ``evaluation.json``, ``held-out.png`` and ``neighbours.png`` to.
        concepts: What the model was taught; ``None``: everything.
        steps: Of the classifier's training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = read_pack(pack)
    styles_of = defaultdict(set)
    for m, _ in drawings:
        if m["group"] in GROUPS or m["label"] in CORE:
            styles_of[m["label"]].add(m["style"])
    named = sorted(label for label, found in styles_of.items() if label in CORE or len(found) == len(STYLES))
    pairs = [pair for pair in HELD_OUT if pair[0] in named]
    real = {(m["label"], m["style"]): Image.open(io.BytesIO(data)).convert("RGB") for m, data in drawings}
    classifier = train_classifier(drawings, named, steps)
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    for k in range(0, len(pairs), 20):
        prompts = [f"{concept}, {style} style" for concept, style in pairs[k : k + 20]]
        made += pipe(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts], **embedded_defaults()).images
    wanted = [real[pair] for pair in pairs]
    seen = [key for key in real if key not in set(pairs) and (concepts is None or key[0] in concepts)]
    known = [real[key] for key in seen]
    distances, which = nearest(made, known, 3)
    result: dict[str, object] = {
        "prompts": len(pairs),
        "concepts": len(named),
        "model": accuracies(classifier, made, pairs, named),
        "real_drawings_through_autoencoder": accuracies(classifier, through_autoencoder(pipe, wanted, made[0].width), pairs, named),
        "distance_to_nearest_training_picture": float(np.median(distances[:, 0])),
        "the_same_of_the_held_out_drawings": float(np.median(nearest(wanted, known, 1)[0])),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    titles = [f"{concept}, {style}" for concept, style in pairs]
    sheet([(t, [m, w]) for t, m, w in zip(titles, made, wanted, strict=True)], folder / "held-out.png")
    rows = [(titles[k], [made[k], *(known[i] for i in which[k])]) for k in range(0, len(pairs), max(1, len(pairs) // 20))][:20]
    sheet(rows, folder / "neighbours.png")
    return result
