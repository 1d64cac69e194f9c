"""Trains the small model that ships with Sfumato: a miniature Stable Diffusion of emoji drawings, 64 pixels.

    python recipes/emoji/train.py all --data DATA --work WORK --out FOLDER

DATA holds ``emoji-128.tar`` (drawings, ``STYLE/CODE.webp``) and ``metadata.jsonl`` (label, tags, group and style of each file). The
stages are ``vae`` (an autoencoder, 4 pixels per latent), ``denoiser`` (text encoder and U-Net together; resumes from WORK) and
``export``; ``all`` runs the three. One process, one core is enough: about 20 minutes for the autoencoder, 90 for the denoiser.

The objective is v-prediction (arXiv:2202.00512) on a schedule of zero terminal signal (arXiv:2305.08891), with a tenth of the
captions empty for guidance, and an average of the weights over training (EMA) is what ships.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tqdm import tqdm

import sfumato

SIZE, TOKENS, VOCABULARY = 64, 32, 2046


def names(text: str) -> frozenset[str]:
    """Splits a wrapped list of names."""
    return frozenset(" ".join(text.split()).split(", "))


CONCEPTS = names(
    """
    red apple, green apple, strawberry, banana, cherries, lemon, watermelon, pizza, hamburger, doughnut, carrot, mushroom,
    avocado, birthday cake, cookie, red heart, orange heart, yellow heart, green heart, blue heart, purple heart, broken
    heart, grinning face, crying face, angry face, smiling face with heart-eyes, smiling face with sunglasses, winking face,
    cat face, grinning cat, dog face, panda, pig face, frog, octopus, tropical fish, lady beetle, butterfly, turtle, rocket,
    sun, star, soccer ball, fire, rainbow, cloud, crown, light bulb, house, automobile
    """
)
"""What the model learns. Few concepts learned well beat many learned badly: this is an hour and a half of one core."""


def load_data(data: Path, work: Path) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Reads the drawings, (N, 64, 64, 3) uint8, and their descriptions; kept in WORK for the next time."""
    cached = work / "data64.pt"
    if cached.exists():
        return torch.load(cached)  # type: ignore[no-any-return]
    described = {m["file"]: m for m in map(json.loads, (data / "metadata.jsonl").read_text().splitlines())}
    pictures, descriptions = [], []
    with tarfile.open(data / "emoji-128.tar") as tar:
        for member in tqdm(tar.getmembers(), desc="reading"):
            if member.isfile():
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
                picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3))
                descriptions.append(described[member.name.removeprefix("./")])
    torch.save((torch.stack(pictures), descriptions), cached)
    return torch.stack(pictures), descriptions


def to_input(pictures: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in -1..1."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_vae(pictures: torch.Tensor, work: Path, budget: float) -> None:
    """Trains the autoencoder on pixels, edges and a weak prior, for ``budget`` seconds."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = sfumato.AutoencoderKL(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=SIZE, **blocks)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    average = {k: v.detach().clone() for k, v in vae.state_dict().items()}
    start, step = time.monotonic(), 0
    with tqdm(total=round(budget), unit="s", desc="autoencoder") as bar:
        while (elapsed := time.monotonic() - start) < budget:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * elapsed / budget)) + 1e-5
            x = to_input(pictures[torch.randint(len(pictures), (16,))])
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
            edges = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y), strict=True))
            loss = (x - y).abs().mean() + (x - y).square().mean() + 0.5 * edges + 2e-4 * posterior.kl().mean() / 1024
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                for key, value in vae.state_dict().items():
                    average[key].lerp_(value, 1 - min(0.995, 1 - 1 / (step + 1)))
            bar.n = round(time.monotonic() - start)
            bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.load_state_dict(average)
    vae.save_pretrained(work / "vae")


def make_tokenizer(descriptions: list[dict[str, Any]], work: Path) -> Any:
    """Learns a byte-pair vocabulary from the captions and stores it in the format of CLIP's tokenizer."""
    folder = work / "tokenizer"
    if not (folder / "vocab.json").exists():
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), byte_level])
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(alphabet), end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        )
        texts = [t for m in descriptions for t in (f"{m['label']}, {m['style']} style", " ".join(m["tags"]))]
        tokenizer.train_from_iterator(texts, trainer)
        merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
        entries = [
            *alphabet,
            *(a + "</w>" for a in alphabet),
            *(m.replace(" ", "") for m in merges),
            "<|startoftext|>",
            "<|endoftext|>",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(entries))}, ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def caption(description: dict[str, Any], rng: random.Random) -> str:
    """Draws a caption: nothing, the label, or the label with style and tags in several orders."""
    label, style, chance = description["label"], description["style"], rng.random()
    if chance < 0.10:
        return ""
    if chance < 0.25:
        return label
    if chance < 0.65:
        return f"{label}, {style} style"
    if chance < 0.80:
        return f"{style} {label}"
    tags = rng.sample(description["tags"], min(len(description["tags"]), rng.randint(1, 3)))
    return ", ".join([label, *tags, *([f"{style} style"] if rng.random() < 0.5 else [])])


def concepts(descriptions: list[dict[str, Any]]) -> tuple[list[list[int]], torch.Tensor]:
    """Drawings of each concept, and how often to draw the concept: all alike, but for the apple of the README."""
    found: dict[str, list[int]] = {}
    for i, m in enumerate(descriptions):
        if m["label"] in CONCEPTS:
            found.setdefault(m["label"], []).append(i)
    return list(found.values()), torch.tensor([2.0 if label == "red apple" else 1.0 for label in found])


def make_networks(tokenizer: Any) -> tuple[Any, Any]:
    """The U-Net (7.6M parameters) and the text encoder (1.7M)."""
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=192, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = sfumato.UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(64, 96, 160), layers_per_block=1, cross_attention_dim=192, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet.to(memory_format=torch.channels_last), transformers.CLIPTextModel(text)


def make_scheduler() -> Any:
    """The noise schedule of training, which sampling takes over."""
    return sfumato.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip


def weights_of(unet: Any, text_encoder: Any) -> dict[str, torch.Tensor]:
    """Both networks' parameters in one dictionary."""
    return {**{f"u.{k}": v for k, v in unet.state_dict().items()}, **{f"t.{k}": v for k, v in text_encoder.state_dict().items()}}


def put_weights(unet: Any, text_encoder: Any, weights: dict[str, torch.Tensor]) -> None:
    """Undoes :func:`weights_of`."""
    unet.load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith("u.")})
    text_encoder.load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith("t.")})


@torch.no_grad()
def latents_of(pictures: torch.Tensor, work: Path) -> tuple[torch.Tensor, float]:
    """Latents of all drawings, scaled to unit deviation, and that scale."""
    vae = sfumato.AutoencoderKL.from_pretrained(work / "vae")
    latents = torch.cat([vae.encode(to_input(part)).latent_dist.mean for part in pictures.split(64)])
    scale = 1 / latents.std().item()
    return latents * scale, scale


def train_denoiser(pictures: torch.Tensor, descriptions: list[dict[str, Any]], work: Path, budget: float) -> None:
    """Trains U-Net and text encoder together for ``budget`` seconds in all; goes on from WORK's checkpoint."""
    tokenizer = make_tokenizer(descriptions, work)
    latents, scale = latents_of(pictures, work)
    torch.manual_seed(1)
    unet, text_encoder = make_networks(tokenizer)
    parameters = [*unet.parameters(), *text_encoder.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in weights_of(unet, text_encoder).items()}
    step, spent, checkpoint = 0, 0.0, work / "ck.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        put_weights(unet, text_encoder, saved["w"])
        optimizer.load_state_dict(saved["o"])
        average, step, spent = saved["e"], saved["n"], saved["t"]
    rng = random.Random(step + 1)
    generator = torch.Generator().manual_seed(step + 1)
    members, weights = concepts(descriptions)
    signal = make_scheduler().alphas_cumprod

    def save() -> None:
        state = {
            "w": weights_of(unet, text_encoder),
            "o": optimizer.state_dict(),
            "e": average,
            "n": step,
            "t": elapsed,
            "scale": scale,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    start, saved_at, batch, smooth = time.monotonic() - spent, spent, 32, 1.0
    with tqdm(total=round(budget), unit="s", desc="denoiser") as bar:
        while (elapsed := time.monotonic() - start) < budget:
            for group in optimizer.param_groups:
                group["lr"] = 1.2e-3 * min(1, (step + 1) / 300) * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * elapsed / budget)))
            chosen = [rng.choice(members[c]) for c in torch.multinomial(weights, batch, True, generator=generator).tolist()]
            texts = [caption(descriptions[i], rng) for i in chosen]
            ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
            x = latents[chosen].contiguous(memory_format=torch.channels_last)
            noise = torch.randn(x.shape, generator=generator)
            t = torch.randint(len(signal), (batch,), generator=generator)
            alpha, sigma = signal[t].view(-1, 1, 1, 1).sqrt(), (1 - signal[t]).view(-1, 1, 1, 1).sqrt()
            velocity = alpha * noise - sigma * x
            loss = F.mse_loss(unet(alpha * x + sigma * noise, t, text_encoder(ids)[0]).sample, velocity)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            smooth = 0.99 * smooth + 0.01 * loss.item()
            with torch.no_grad():
                for key, value in weights_of(unet, text_encoder).items():
                    average[key].lerp_(value, 1 - min(0.9995, (1 + step) / (10 + step)))
            bar.n = round(elapsed)
            bar.set_postfix(samples=step * batch, loss=f"{smooth:.4f}")
            if elapsed - saved_at > 180:
                saved_at = elapsed
                save()
    save()


def export(descriptions: list[dict[str, Any]], work: Path, out: Path) -> None:
    """Writes the averaged weights as an ordinary pipeline folder in float16."""
    saved = torch.load(work / "ck.pt")
    tokenizer = make_tokenizer(descriptions, work)
    unet, text_encoder = make_networks(tokenizer)
    put_weights(unet, text_encoder, saved["e"])
    vae = sfumato.AutoencoderKL.from_pretrained(work / "vae", scaling_factor=saved["scale"])
    scheduler = sfumato.DDIMScheduler.from_config({**make_scheduler().config, "set_alpha_to_one": True, "steps_offset": 1})
    pipe = sfumato.StableDiffusionPipeline(
        vae, text_encoder.eval(), tokenizer, unet.eval(), scheduler, safety_checker=None, requires_safety_checker=False
    )
    shutil.rmtree(out, ignore_errors=True)
    pipe.to(torch.float16, memory_format=torch.contiguous_format).save_pretrained(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, trained on {saved['n'] * 32:,} samples in {saved['t'] / 60:.0f} minutes")


def main() -> None:
    """Runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "denoiser", "export", "all"))
    parser.add_argument("--data", type=Path, required=True, help="folder of emoji-128.tar and metadata.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the finished pipeline")
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--denoiser-minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.stage in ("export", "all") and options.out is None:
        parser.error("--out is needed to export")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    pictures, descriptions = load_data(options.data, options.work)
    if options.stage in ("vae", "all"):
        train_vae(pictures, options.work, options.vae_minutes * 60)
    if options.stage in ("denoiser", "all"):
        train_denoiser(pictures, descriptions, options.work, options.denoiser_minutes * 60)
    if options.stage in ("export", "all"):
        export(descriptions, options.work, options.out)


if __name__ == "__main__":
    main()
