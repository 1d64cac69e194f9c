"""The training loop: what a step computes, exact resuming, checkpoints that survive anything."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sfumato
from sfumato.errors import ConfigError
from sfumato.training import checkpoint as checkpoints
from sfumato.training.autoencoder import Autoencoder
from sfumato.training.loop import Trainer
from sfumato.training.sampling import Sampler, generator
from sfumato.training.settings import AutoencoderSettings, Settings, TextToImageSettings
from sfumato.training.text_to_image import TextToImage

Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for k in range(8):
        tiny.picture(k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(["red cat", "blue cat"][k % 2])
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint("StableDiffusionPipeline")[0]


def settings(model: Path, data: Path, out: Path, **more: Any) -> TextToImageSettings:
    base = dict(model=str(model), data=str(data), out=str(out), resolution=32, batch_size=4, steps=6, learning_rate=1e-3, ema=0.9)
    return TextToImageSettings(**{**base, **dict(checkpoint_every=2, validate_every=100, keep=9), **more})


def train(s: TextToImageSettings) -> Path:
    return Trainer(TextToImage(s), s).run()


def newest(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = checkpoints.newest(out / "checkpoints")
    assert folder is not None
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


def assert_same(first: Path, second: Path) -> None:
    (tensors, state), (others, other_state) = newest(first), newest(second)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert state == other_state


# --- what a step computes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_steps_are_those_of_a_plain_loop_on_the_reference(model: Path, data: Path, tmp_path: Path, prediction: str) -> None:
    """Three steps, U-Net and text encoder together, against the reference's networks, scheduler and torch's AdamW."""
    s = settings(
        model, data, tmp_path / "run", steps=3, train_text_encoder=True, scheduler={"prediction_type": prediction}, weight_decay=0.1
    )
    task = TextToImage(s)
    trainer = Trainer(task, s)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    table = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    networks = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    optimizer = torch.optim.AdamW(networks.parameters(), lr=1e-3, weight_decay=0.1)
    average = {n: p.detach().clone() for n, p in networks.named_parameters()}
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(data / f"{k}.png"))) for k in range(8)]).permute(0, 3, 1, 2)
    for step in range(3):
        examples = task.sampler.batch(step)
        draw = generator(s.seed, "step", step, 0)
        inputs = task.inputs(examples, draw)
        x0 = invert(task, inputs, table)
        with torch.no_grad():
            posterior = pipe.vae.encode(pictures[examples] / 127.5 - 1).latent_dist
            drawn = (x0 / pipe.vae.config.scaling_factor - posterior.mean) / posterior.std
        assert drawn.std() == pytest.approx(1, abs=0.1)  # a sample of the posterior
        t = inputs["time"]
        noise = (inputs["noisy"] - table.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1) * x0) / (
            1 - table.alphas_cumprod[t]
        ).sqrt().view(-1, 1, 1, 1)
        target = noise if prediction == "epsilon" else table.get_velocity(x0, noise, t)
        states = pipe.text_encoder(inputs["text"])[0]
        loss = nn.functional.mse_loss(pipe.unet(table.add_noise(x0, noise, t), t, states).sample, target)
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.make_step().item() == pytest.approx(loss.item(), rel=1e-4)
        kept = min(0.9, (2 + step) / (11 + step))
        for name, parameter in networks.named_parameters():
            average[name] = kept * average[name] + (1 - kept) * parameter.detach()
    ours = dict(task.module.named_parameters())
    for name, parameter in networks.named_parameters():
        name = name.replace("text_encoder.text_model.", "text_encoder.")
        torch.testing.assert_close(ours[name], parameter, atol=2e-4, rtol=0)
    for name, value in average.items():
        torch.testing.assert_close(trainer.average[name.replace("encoder.text_model.", "encoder.")], value, atol=2e-4, rtol=0)


def invert(task: TextToImage, inputs: dict[str, torch.Tensor], table: Any) -> torch.Tensor:
    """The clean latents that noisy ones and the target belong to."""
    bar = table.alphas_cumprod[inputs["time"]].view(-1, 1, 1, 1)
    if task.objective.kind == "epsilon":
        return (inputs["noisy"] - (1 - bar).sqrt() * inputs["target"]) / bar.sqrt()
    return bar.sqrt() * inputs["noisy"] - (1 - bar).sqrt() * inputs["target"]


class Line(nn.Module):
    """A toy: learns the mean of numbers."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.value, self.values = nn.Parameter(torch.zeros(())), torch.tensor(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.value - x).square().mean()


class LineTask:
    def __init__(self, size: int) -> None:
        self.module = Line([1.0, 2.0, 3.0, 6.0])
        self.sampler, self.held_out = Sampler([range(4)], [1.0] * 4, size, 0), [[0], [3]]

    def inputs(self, examples: list[int], draw: torch.Generator, held_out: bool = False) -> dict[str, torch.Tensor]:
        return {"x": self.module.values[examples]}

    def pictures(self) -> list[Image.Image]:
        return []

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "value").write_text(repr(self.module.value.item()))


def toy(out: Path, size: int = 4, **more: Any) -> Trainer:
    return Trainer(LineTask(size), Settings(data="-", out=str(out), batch_size=size, **more))


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    whole, parts = toy(tmp_path / "a", steps=20), toy(tmp_path / "b", 1, steps=20, accumulation=4)
    whole.run(), parts.run()
    torch.testing.assert_close(whole.task.module.value, parts.task.module.value)


TWO = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_training import toy
toy(Path({out!r}), steps=20, ema=0.5, learning_rate=0.1).run()
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each takes its share of a batch; the gradients are averaged."""
    toy(tmp_path / "one", steps=20, ema=0.5, learning_rate=0.1).run()
    script = tmp_path / "two.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent), out=str(tmp_path / "two")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (first, _), (second, _) = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name])


def test_the_average_is_saved_and_measured(tmp_path: Path) -> None:
    trainer = toy(tmp_path / "a", steps=30, learning_rate=0.1, ema=0.8)
    value, average = torch.zeros((), requires_grad=True), 0.0
    adam = torch.optim.AdamW([value], lr=0.1, weight_decay=0.01)
    for step in range(1, 31):
        (value - torch.tensor([1.0, 2.0, 3.0, 6.0])).square().mean().backward()
        nn.utils.clip_grad_norm_([value], 1.0)
        adam.step(), adam.zero_grad()
        kept = min(0.8, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * value.item()
    folder = trainer.run()
    assert float((folder / "value").read_text()) == pytest.approx(average, rel=1e-5)
    assert trainer.task.module.value.item() == pytest.approx(value.item(), rel=1e-5)
    found = trainer.validate()["validation_loss"]
    assert found == pytest.approx(((average - 1) ** 2 + (average - 6) ** 2) / 2, rel=1e-4)


def test_clipping_and_schedule(tmp_path: Path) -> None:
    """Of AdamW's moments after one step; the learning rate after ten."""
    trainer = toy(tmp_path / "a", steps=10, clip_norm=0.5, warmup=4, schedule="linear", learning_rate=0.1)
    trainer.make_step()
    (moments,) = trainer.optimizer.state.values()
    assert moments["exp_avg"].item() == pytest.approx(-0.1 * 0.5, rel=1e-4)
    rates = [trainer.schedule.get_last_lr()[0]]
    for _ in range(9):
        trainer.make_step()
        rates.append(trainer.schedule.get_last_lr()[0])
    assert rates == pytest.approx([0.1 * min((k + 1) / 4, (9 - k) / 6) for k in range(10)])
    free = toy(tmp_path / "b", steps=10, clip_norm=0)
    free.make_step()
    (moments,) = free.optimizer.state.values()
    assert moments["exp_avg"].item() == pytest.approx(-0.1 * 6, rel=1e-4)  # 2 * (0 - 3)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = toy(tmp_path / "a", steps=10, checkpoint_every=2, log_every=1)
    for _ in range(2):
        trainer.make_step()
    trainer.save_checkpoint()
    trainer.task.module.values[2] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the loss at step 3 is inf: go on from the last checkpoint"):
        trainer.run()
    assert [p.name for p in checkpoints.found(tmp_path / "a" / "checkpoints")] == ["step-00000002"]


def test_global_random_state_is_neither_read_nor_changed(model: Path, data: Path, tmp_path: Path) -> None:
    unet = dict(diffusers.UNet2DConditionModel.load_config(model / "unet"))
    unet = {k: v for k, v in unet.items() if not k.startswith("_")}
    for out, seed in ((tmp_path / "a", 1), (tmp_path / "b", 2)):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        train(settings(model, data, out, steps=2, unet=unet))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert_same(tmp_path / "a", tmp_path / "b")


# --- exact resuming


MODES = {
    "plain": {},
    "joint": dict(train_text_encoder=True, schedule="cosine", warmup=2, caption_dropout=0.5, noise_offset=0.1),
    "weighted": dict(
        min_snr_gamma=5.0, timesteps="logit-normal", accumulation=2, precision="bf16", scheduler={"prediction_type": "v_prediction"}
    ),
    "scaled": dict(precision="fp16", ema=0.0),
    "flow": dict(
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
        timesteps="logit-normal",
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_exact(model: Path, data: Path, tmp_path: Path, mode: str) -> None:
    train(settings(model, data, tmp_path / "whole", **MODES[mode]))
    parts = settings(model, data, tmp_path / "parts", **MODES[mode])
    interrupted = Trainer(TextToImage(parts), parts)
    for _ in range(3):
        interrupted.make_step()
    interrupted.save_checkpoint()
    interrupted.make_step()  # lost
    model_folder = train(settings(model, data, tmp_path / "parts", resume=True, **MODES[mode]))
    assert_same(tmp_path / "whole", tmp_path / "parts")
    for path in (tmp_path / "whole" / "model").rglob("*.safetensors"):
        assert path.read_bytes() == (model_folder / path.relative_to(tmp_path / "whole" / "model")).read_bytes()


def test_validation_changes_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    train(settings(model, data, tmp_path / "a", steps=3))
    more = dict(validation_data=str(data), validate_every=1, validation_prompts=["red cat"], validation_inference_steps=2)
    s = settings(model, data, tmp_path / "b", steps=3, log_every=1, **more)
    trainer = Trainer(TextToImage(s), s)
    trainer.run()
    first, second = newest(tmp_path / "a")[0], newest(tmp_path / "b")[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert trainer.validate() == trainer.validate()
    assert [p.name for p in sorted((tmp_path / "b" / "samples").iterdir())] == [f"step-0000000{k}.png" for k in (1, 2, 3)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "b" / "log")).Reload()
    assert {"loss", "learning_rate", "pictures_per_second", "validation_loss"} <= set(log.Tags()["scalars"])
    assert [e.step for e in log.Scalars("validation_loss")] == [1, 2, 3]


def test_a_finished_run_can_be_lengthened(model: Path, data: Path, tmp_path: Path) -> None:
    train(settings(model, data, tmp_path / "whole", steps=6))
    train(settings(model, data, tmp_path / "parts", steps=4))
    train(settings(model, data, tmp_path / "parts", steps=6, resume=True))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_is_not_overwritten_nor_mixed(tmp_path: Path) -> None:
    toy(tmp_path / "a", steps=2).run()
    with pytest.raises(ConfigError, match=r"holds step-00000002 of an earlier run: add --resume, or name another --out"):
        toy(tmp_path / "a", steps=2)
    with pytest.raises(ConfigError, match=r"seed=1, but .*step-00000002 was trained with seed=0: resume with the old value"):
        toy(tmp_path / "a", steps=4, seed=1, resume=True)
    task = LineTask(4)
    task.sampler = Sampler([range(3)], [1.0] * 4, 4, 0)
    with pytest.raises(ConfigError, match=r"examples='\w+', but .* was trained with examples='\w+'"):
        Trainer(task, Settings(data="-", out=str(tmp_path / "a"), batch_size=4, steps=4, resume=True))
    state = tmp_path / "a" / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ConfigError, match="has format 2, expected 1"):
        toy(tmp_path / "a", steps=4, resume=True)


def test_a_step_that_half_precision_skips_is_resumed_too(tmp_path: Path) -> None:
    first = toy(tmp_path / "a", steps=30, precision="fp16", checkpoint_every=50)
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 2.0**127})  # overflows: the first steps are left out
    first.make_step()
    assert first.task.module.value.item() == 0
    first.save_checkpoint()
    second = toy(tmp_path / "a", steps=30, precision="fp16", checkpoint_every=50, resume=True)
    for _ in range(20):
        first.make_step(), second.make_step()
    assert second.task.module.value.item() == first.task.module.value.item() != 0


# --- checkpoints that survive


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    toy(tmp_path / "a", steps=9, checkpoint_every=2, keep=3).run()
    assert [p.name for p in checkpoints.found(tmp_path / "a" / "checkpoints")] == [f"step-0000000{k}" for k in (6, 8, 9)]
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == [f"step-0000000{k}" for k in (6, 8, 9)]


def test_a_full_disk_is_a_clear_error(model: Path, data: Path, tmp_path: Path) -> None:
    train(settings(model, data, tmp_path / "a", steps=2))
    s = settings(model, data, tmp_path / "a", steps=4, resume=True)
    trainer = Trainer(TextToImage(s), s)
    before = newest(tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file cannot grow beyond it, as on a full disk
    try:
        with pytest.raises(OSError, match=r"could not write the checkpoint .*step-00000004 .*step-00000002 is whole: go on with"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = newest(tmp_path / "a")
    assert before[1] == after[1] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000002"]
    train(s)
    train(settings(model, data, tmp_path / "b", steps=4))
    assert_same(tmp_path / "a", tmp_path / "b")


KILLED = """
import sys, torch
torch.set_num_threads(1)
from sfumato.training.loop import Trainer
from sfumato.training.settings import TextToImageSettings
from sfumato.training.text_to_image import TextToImage
s = TextToImageSettings.read(None, **{values!r})
Trainer(TextToImage(s), s).run()
"""


def kill_and_resume(model: Path, data: Path, tmp_path: Path, kills: int, steps: int) -> None:
    """SIGKILLs the trainer at random moments, most of which fall into the writing of a checkpoint, and compares the end."""
    rng, out = random.Random(kills), tmp_path / "killed"
    values = dict(
        model=str(model), data=str(data), out=str(out), resolution=32, batch_size=2, steps=10**6, ema=0.9, learning_rate=1e-3
    )
    values |= dict(checkpoint_every=1, keep=2, validate_every=10**6)
    reached = 0
    for _ in range(kills):
        code = KILLED.format(values={**values, "resume": True})
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while last_step(out) <= reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -9, errors.decode()
        found = checkpoints.found(out / "checkpoints")
        assert 1 <= len(found) <= 3
        for folder in found:
            step, tensors, _ = checkpoints.load(folder, {})
            assert folder.name == f"step-{step:08d}" and all(t.isfinite().all() for t in tensors.values())
        assert last_step(out) > reached
        reached = last_step(out)
    final = max(steps, reached + 1)
    for folder in (out, tmp_path / "whole"):
        train(TextToImageSettings(**{**values, "out": str(folder), "steps": final, "checkpoint_every": final, "resume": True}))
    assert_same(out, tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".*"))


def last_step(out: Path) -> int:
    return max((int(p.name[5:]) for p in (out / "checkpoints").glob("step-*")), default=0)


def test_a_killed_trainer_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    kill_and_resume(model, data, tmp_path, kills=2, steps=5)


@pytest.mark.slow
def test_a_trainer_killed_twenty_times_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    kill_and_resume(model, data, tmp_path, kills=20, steps=5)


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_a_missing_package_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"not installed \(.*{package}.*\): pip install 'sfumato\[train\]'"):
        toy(tmp_path / "a", steps=2)
    assert not (tmp_path / "a").exists()


# --- results


def test_the_reference_loads_the_result(model: Path, data: Path, tmp_path: Path) -> None:
    folder = train(settings(model, data, tmp_path / "run", steps=2, train_text_encoder=True))
    pictures = []
    for library in (diffusers, sfumato):
        pipe = library.StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        call = dict(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np", height=32, width=32)
        pictures.append(pipe("a red cat", **call).images)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-4)
    weights, kept = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), newest(tmp_path / "run")[0]
    for name, tensor in weights.items():
        assert torch.equal(tensor, kept[f"ema.unet.{name}"])


VAE = dict(
    block_out_channels=[8, 16],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    norm_num_groups=4,
)


def test_autoencoder(data: Path, tmp_path: Path) -> None:
    base = dict(data=str(data), validation_data=str(data), resolution=32, batch_size=4, learning_rate=3e-3, ema=0.9)
    losses = []
    for steps in (1, 40):
        s = AutoencoderSettings(out=str(tmp_path / str(steps)), vae=VAE, steps=steps, kl_weight=1e-4, validate_every=20, **base)
        trainer = Trainer(Autoencoder(s), s)
        folder = trainer.run()
        losses.append(trainer.validate()["validation_loss"])
    assert losses[1] < 0.6 * losses[0]
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(data / f"{k}.png"))) for k in range(8)])
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        assert (posterior.mean * vae.config.scaling_factor).std() == pytest.approx(1, rel=0.02)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        made = vae.decode(posterior.mean + posterior.std * noise).sample
        expected = (made - pixels).abs().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        expected += 0.5 * (made.diff(dim=2) - pixels.diff(dim=2)).abs().mean()
        expected += 0.5 * (made.diff(dim=3) - pixels.diff(dim=3)).abs().mean()
        with trainer.averaged():
            assert trainer.task.module(pixels, noise).item() == pytest.approx(expected.item(), rel=1e-4)
    assert (tmp_path / "40" / "samples" / "step-00000040.png").is_file()
    with pytest.raises(ConfigError, match="vae is not given"):
        Autoencoder(AutoencoderSettings(out=str(tmp_path / "x"), **base))


def test_latents_and_texts_are_cached(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = settings(model, data, tmp_path / "run")
    first = TextToImage(s)
    monkeypatch.setattr(TextToImage, "encode", None)  # a second run must not need it
    monkeypatch.setattr(sfumato.CLIPTextModel, "forward", None)
    second = TextToImage(s)
    assert torch.equal(first.data.latents[[0, 3]], second.data.latents[[0, 3]])
    assert torch.equal(first.data.texts[[0, 1]], second.data.texts[[0, 1]])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    tokens = pipe.tokenizer(["", "red cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(first.data.texts[[0, 1]], pipe.text_encoder(tokens)[0], atol=1e-5, rtol=1e-5)


def test_captions_that_are_cut_are_named(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    for k, text in enumerate(("red cat", "many " * 80)):
        tiny.picture(k).save(tmp_path / "data" / f"{k}.png")
        (tmp_path / "data" / f"{k}.txt").write_text(text)
    TextToImage(settings(model, tmp_path / "data", tmp_path / "run"))
    assert "1 of 3 captions are cut at 77 tokens, the first is 'many many" in caplog.text


SMALL: dict[str, Any] = dict(
    block_out_channels=[8],
    down_block_types=["DownBlock2D"],
    up_block_types=["UpBlock2D"],
    norm_num_groups=4,
    cross_attention_dim=32,
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(model=None), r"scheduler is not given: add a table \[scheduler\], or a model"),
        (dict(model=None, scheduler={}), "vae is not given: name it in the configuration, or a model"),
        (dict(resolution=37), r"resolution=37 must be a multiple of 4 for this model, such as 36"),
        (dict(unet={"sample_sise": 8}), "configuration of UNet2DConditionModel, which has no key 'sample_sise'; did you mean"),
        (dict(unet=dict(SMALL, cross_attention_dim=8)), "unet cross_attention_dim is 8, but the other parts want 32"),
        (dict(text_encoder=dict(hidden_size=32, num_attention_heads=2, vocab_size=9)), "vocab_size is 9, but the tokenizer has"),
        (dict(unet=dict(SMALL, dropout=0.1)), "has dropout 0.1, which draws from the global random state"),
        (dict(scheduler={"prediction_type": "sample"}), "prediction_type='sample' cannot be trained"),
        (dict(scheduler={"rescale_betas_zero_snr": True}), "prediction_type='epsilon' cannot be learnt on a table that ends"),
        (dict(scheduler={"beta_start_": 1.0}), r"\[scheduler\] is not a configuration of DDIMScheduler, which has no key"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(model: Path, data: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(settings(model, data, tmp_path / "run"), **more))
