"""Makes the emoji model from nothing: ``python recipes/emoji/recipe.py --size large --work WORK --out FOLDER``.

Stages, each of which goes on where it was interrupted: ``data`` (drawings from public packages, packed), ``prepare`` (captions,
what is held out, vocabulary), ``autoencoder``, ``denoiser`` (text encoder and U-Net together), ``export`` (float16), ``evaluate``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from concepts import CORE
from drawings import make_pack, make_smoke_pack
from evaluate import evaluate
from prepare import make_tokenizer, read_pack, training_set
from transformers import CLIPTokenizer

import sfumato
from sfumato.training.autoencoder import Autoencoder
from sfumato.training.loop import Trainer
from sfumato.training.settings import AutoencoderSettings, Settings, TextToImageSettings, read_toml
from sfumato.training.text_to_image import TextToImage

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """What differs between the sizes, beside the trainer's own settings in ``sizes/NAME``.

    Attributes:
        concepts: Labels to teach; ``None``: all but people.
        colours: Weight of drawings in other colours; see :func:`prepare.training_set`.
        edge: Of the pictures, in pixels.
        vocabulary, length: Of the tokenizer.
        classifier_steps: Of the training of the measure's classifier.
    """

    concepts: tuple[str, ...] | None
    colours: float
    edge: int
    vocabulary: int
    length: int
    classifier_steps: int


SIZES = {
    "large": Size(None, 0.5, 128, 4096, 32, 1500),
    "small": Size(CORE, 0.15, 64, 2048, 24, 1500),
    "smoke": Size(None, 0.5, 32, 600, 16, 30),
}
STAGES = ("data", "prepare", "autoencoder", "denoiser", "export", "evaluate")


class Recipe:
    """The stages.

    Args:
        size: Name of the size.
        work: Folder of everything in between.
        out: Folder of the finished pipeline.
        data: Folder of packed drawings; ``None``: made in ``work``.
    """

    def __init__(self, size: str, work: Path, out: Path, data: Path | None = None) -> None:
        self.name, self.size, self.work, self.out = size, SIZES[size], work, out
        self.pack = data or work / "pack"
        work.mkdir(parents=True, exist_ok=True)

    def data(self) -> None:
        """Packs the drawings, unless they are given or there."""
        if not (self.pack / "metadata.jsonl").is_file():
            if self.name == "smoke":
                make_smoke_pack(self.pack)
            else:
                make_pack(self.pack, self.work / "packages")

    def prepare(self) -> None:
        """Writes training data and vocabulary."""
        target = self.work / "set"
        target.mkdir(exist_ok=True)
        training_set(read_pack(self.pack), target, self.size.concepts, self.size.colours, self.size.edge)
        texts = (target / "texts.txt").read_text(encoding="utf-8").splitlines()
        make_tokenizer(texts, self.work / "tokenizer", self.size.vocabulary, self.size.length)

    def _settings(self, kind: type[Settings], stage: str, **more: object) -> Settings:
        paths = {"data": self.work / "set" / "train.tar", "validation_data": self.work / "set" / "held-out.tar"}
        paths |= {"out": self.work / stage}
        return kind.read(HERE / "sizes" / self.name / f"{stage}.toml", resume=True, **more, **{k: str(p) for k, p in paths.items()})

    def autoencoder(self) -> None:
        """Trains the autoencoder."""
        settings = self._settings(AutoencoderSettings, "autoencoder")
        Trainer(Autoencoder(settings), settings).run()

    def denoiser(self) -> None:
        """Trains text encoder and U-Net."""
        words = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        parts: dict[str, Any] = {"vae": str(self.work / "autoencoder" / "model"), "tokenizer": str(self.work / "tokenizer")}
        table = read_toml(HERE / "sizes" / self.name / "denoiser.toml")["text_encoder"]
        parts["text_encoder"] = {**table, "vocab_size": len(words), "eos_token_id": words.eos_token_id}
        settings = self._settings(TextToImageSettings, "denoiser", **parts)
        Trainer(TextToImage(settings), settings).run()

    def export(self) -> None:
        """Writes the pipeline in float16."""
        pipe = sfumato.StableDiffusionPipeline.from_pretrained(self.work / "denoiser" / "model", dtype=torch.float16)
        shutil.rmtree(self.out, ignore_errors=True)
        pipe.save_pretrained(self.out)
        size = sum(p.stat().st_size for p in self.out.rglob("*") if p.is_file())
        print(f"{self.out}: {size / 1e6:.1f} MB")

    def evaluate(self) -> None:
        """Measures the pipeline; writes the figures and the sheets beside it."""
        size = self.size
        print(json.dumps(evaluate(self.out, self.pack, self.work / "evaluation", size.concepts, size.classifier_steps), indent=2))


def main() -> None:
    """Runs the stages that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all without it")
    parser.add_argument("--size", choices=SIZES, default="large", help="large: for a GPU; small: for a CPU core")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything in between")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--data", type=Path, help="folder of emoji-128.tar and metadata.jsonl, if there is one already")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {unknown.pop()!r}: choose from {', '.join(STAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe(options.size, options.work, options.out, options.data)
    for stage in options.stages or STAGES:
        print(f"--- {stage}", flush=True)
        getattr(recipe, stage)()


if __name__ == "__main__":
    main()
