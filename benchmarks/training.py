"""The trainer beside a plain, hand-written PyTorch loop that trains the same networks on the same data."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BATCH = 16
SIZES = Path(__file__).parents[1] / "recipes" / "emoji" / "sizes" / "small"


def small_model(folder: Path) -> dict[str, Any]:
    """Settings of the recipe's small model, on a few random pictures and with an untrained autoencoder."""
    import sfumato
    from sfumato.training.settings import read_toml

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    data = folder / "data"
    data.mkdir()
    lines = []
    for k in range(64):
        tiny.picture(k, (64, 64)).save(data / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": ["red cat", "blue cat"]}))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    vae = read_toml(SIZES / "autoencoder.toml")["vae"]
    sfumato.AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")
    words = tiny.tokenizer(folder / "words")
    words.model_max_length = 24
    words.save_pretrained(folder / "tokenizer")
    table = read_toml(SIZES / "denoiser.toml")
    text = {**table["text_encoder"], "vocab_size": len(words), "eos_token_id": words.eos_token_id}
    paths = {name: str(folder / name) for name in ("data", "vae", "tokenizer")}
    return {"unet": table["unet"], "text_encoder": text, "scheduler": table["scheduler"], "resolution": 64, **paths}


def plain_loop(task: Any, dtype: torch.dtype, learning_rate: float, ema: float) -> Callable[[], None]:
    """One step of a loop as one writes it by hand: latents and tokens in memory, AdamW, clipping, averaged weights."""
    networks = [task.unet.train(), task.text_encoder.train()]
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    average = [p.detach().clone() for p in parameters]
    latents = task.data.latents[range(64)].chunk(2, dim=1)[0].clone()
    tokens, bar = task.data.texts, task.pipe.scheduler.alphas_cumprod

    def step() -> None:
        rows = torch.randint(len(latents), (BATCH,))
        x, noise, t = latents[rows], torch.randn(BATCH, *latents.shape[1:]), torch.randint(len(bar), (BATCH,))
        alpha, sigma = bar[t].sqrt().view(-1, 1, 1, 1), (1 - bar[t]).sqrt().view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = task.text_encoder(tokens[torch.randint(len(tokens), (BATCH,))])[0]
            loss = F.mse_loss(task.unet(alpha * x + sigma * noise, t, states).sample.float(), alpha * noise - sigma * x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(average, parameters, strict=True):
                kept.lerp_(parameter, 1 - ema)

    return step


def case_training(runs: int) -> Iterator[tuple[str, str, float, float]]:
    """A training step of the recipe's small model, 16 pictures; the first column is a plain PyTorch loop of the same networks."""
    from sfumato.training.loop import Trainer
    from sfumato.training.settings import TextToImageSettings
    from sfumato.training.text_to_image import TextToImage

    from .run import alternate, seconds

    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            base = {**small_model(Path(folder)), "train_text_encoder": True, "ema": 0.999, "batch_size": BATCH, "precision": name}
            tasks = []
            for side in ("plain", "trainer"):
                settings = TextToImageSettings.read(None, out=f"{folder}/{side}", **base)
                tasks.append(TextToImage(settings))
            plain, trainer = plain_loop(tasks[0], dtype, settings.learning_rate, settings.ema), Trainer(tasks[1], settings)
            sides = {"plain": plain, "trainer": trainer.make_step}
            found = alternate({side: lambda step=step: seconds(step) for side, step in sides.items()}, runs, warmup=2)
            yield f"a training step, {name} (first column: plain loop)", "s", found["plain"], found["trainer"]
