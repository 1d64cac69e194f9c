"""The training loop: one for all that is trained.

What a run computes follows from its settings, its data and the step alone: batches, noise, captions are drawn from generators that
are made for (seed, step). So the state of a run is its weights, their average, the optimiser's moments and a number, and going on
from a checkpoint gives what an uninterrupted run gives, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..media.image import make_image_grid, save_image
from . import checkpoint
from .processes import accelerator
from .sampling import Sampler, generator
from .settings import Settings

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Inputs = dict[str, torch.Tensor]


class Task(Protocol):
    """What is trained.

    Attributes:
        module: Holds the trained networks; its ``forward(**inputs)`` returns the loss, a scalar.
        sampler: Draws the examples of a batch.
        held_out: Batches of held-out examples for :meth:`inputs`; may be empty.
    """

    module: nn.Module
    sampler: Sampler
    held_out: list[list[int]]

    def inputs(self, examples: list[int], draw: torch.Generator, held_out: bool = False) -> Inputs:
        """The module's arguments for examples; all randomness comes from ``draw``."""

    def pictures(self) -> list[Image.Image]:
        """What the networks make now, to be looked at; may be empty."""

    def save(self, folder: Path) -> None:
        """Writes the networks as they are for use."""


class Trainer:
    """A run: the task, its optimiser, the step.

    Args:
        task: What is trained.
        settings: How.

    Raises:
        ImportError: A package of the extra ``train`` is not installed.
        ConfigError: ``out`` holds checkpoints and ``resume`` is not set, or they were made with other settings.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        from transformers.optimization import get_scheduler

        self.task, self.settings, self.step = task, settings, 0
        self.accelerator = accelerator()
        self.device = self.accelerator.device
        self.folder = Path(settings.out)
        if settings.batch_size % self.accelerator.num_processes:
            raise ConfigError(f"batch_size={settings.batch_size} must be a multiple of {self.accelerator.num_processes} processes")
        refuse_dropout(task.module)
        self.module = self.accelerator.prepare_model(task.module.to(self.device).train())
        self.parameters = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if settings.ema else {}
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule: Any = get_scheduler(settings.schedule, self.optimizer, settings.warmup, settings.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.identity = {**settings.identity(), "examples": task.sampler.version}
        self._resume()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def _resume(self) -> None:
        newest = checkpoint.newest(self.checkpoints)
        if newest is None:
            return
        if not self.settings.resume:
            raise ConfigError(
                f"out={str(self.folder)!r} holds {newest.name} of an earlier run: add --resume, or name another --out"
            )
        self.step, tensors, state = checkpoint.load(newest, self.identity)
        for prefix, kept in (("model.", self.parameters), ("ema.", self.average)):
            for name, tensor in kept.items():
                tensor.data.copy_(tensors[prefix + name])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for index, name in enumerate(self.parameters):
            start = f"optimizer.{name}/"
            moments[index] = {k.removeprefix(start): v.clone() for k, v in tensors.items() if k.startswith(start)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        log.info("going on from %s", newest)

    def save_checkpoint(self) -> None:
        """Writes a checkpoint; the main process alone."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{n}": p for n, p in self.parameters.items()} | {f"ema.{n}": p for n, p in self.average.items()}
        moments = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            tensors |= {f"optimizer.{name}/{k}": v for k, v in moments[index].items()}
        state = {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(), "settings": self.identity}
        checkpoint.save(self.checkpoints, self.step, tensors, state, self.settings.keep)

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Trains to the last step; returns the folder of the finished model.

        Raises:
            FloatingPointError: The loss is not finite; the last checkpoint is whole.
            OSError: A checkpoint could not be written; older ones are whole.
        """
        s, main = self.settings, self.accelerator.is_main_process
        if main:
            checkpoint.remove_unfinished(self.checkpoints)
        writer = open_log(self.folder / "log", self.step) if main else None
        pictures = s.batch_size * s.accumulation
        with tqdm(total=s.steps, initial=self.step, desc="training", unit="step", disable=None if main else True) as bar:
            since, at = time.monotonic(), self.step
            while self.step < s.steps:
                loss = self.make_step()
                bar.update()
                last = self.step == s.steps
                if self.step % s.log_every == 0 or last:
                    values = {"loss": self.checked(loss), "learning_rate": self.schedule.get_last_lr()[0]}
                    values["pictures_per_second"] = (self.step - at) * pictures / (time.monotonic() - since)
                    since, at = time.monotonic(), self.step
                    if bar.disable and main:
                        log.info("step %d of %d: %s", self.step, s.steps, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
                    bar.set_postfix({"loss": f"{values['loss']:.4f}", "pictures/s": f"{values['pictures_per_second']:.1f}"})
                    record(writer, values, self.step)
                if self.step % s.validate_every == 0 or last:
                    record(writer, self.validate(), self.step)
                if self.step % s.checkpoint_every == 0 or last:
                    self.checked(loss)
                    self.save_checkpoint()
        if writer is not None:
            writer.close()
        model = self.folder / "model"
        if main:
            with self.averaged():
                self.task.save(model)
        self.accelerator.wait_for_everyone()
        return model

    def make_step(self) -> torch.Tensor:
        """Makes one optimiser step; returns the mean loss of its batches."""
        s, accelerator, total = self.settings, self.accelerator, torch.zeros((), device=self.device)
        for part in range(s.accumulation):
            batch = self.step * s.accumulation + part
            rank = accelerator.process_index
            examples = self.task.sampler.batch(batch)[rank :: accelerator.num_processes]
            inputs = self.task.inputs(examples, generator(s.seed, "step", batch, rank))
            last = part == s.accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                loss = self.loss(inputs) / s.accumulation
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if s.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), s.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        if self.average:
            kept = min(s.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_([*self.average.values()], [*self.parameters.values()], 1 - kept)
        return total

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """The module's loss for inputs, in the precision of the settings."""
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        dtype = PRECISIONS[self.settings.precision]
        with torch.autocast(self.device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
            return self.module(**moved)

    def checked(self, loss: torch.Tensor) -> float:
        """The loss as a number."""
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            remedy = (
                "go on from the last checkpoint (--resume) with a new --out and a lower --learning-rate, or --precision float32"
            )
            raise FloatingPointError(f"the loss at step {self.step} is {value}: {remedy}")
        return value

    # --- validation -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights in the networks' place, and evaluation mode; undone at the end."""

        def swap() -> None:
            for name, average in self.average.items():
                parameter = self.parameters[name]
                parameter.data, average.data = average.data, parameter.data

        swap()
        self.task.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.task.module.train()
            swap()

    def validate(self) -> dict[str, float]:
        """Held-out loss, with the same noise each time, and pictures; both by the averaged weights where there are any."""
        if not self.accelerator.is_main_process:
            return {}
        losses = []
        with self.averaged():
            for k, examples in enumerate(self.task.held_out):
                inputs = self.task.inputs(examples, generator(self.settings.seed, "validation", k), held_out=True)
                losses.append(self.loss(inputs).item())
            if pictures := self.task.pictures():
                (self.folder / "samples").mkdir(parents=True, exist_ok=True)
                save_image(make_image_grid(pictures, 1, len(pictures)), self.folder / "samples" / f"step-{self.step:08d}.png")
        return {"validation_loss": sum(losses) / len(losses)} if losses else {}


def open_log(folder: Path, step: int) -> Any:
    """A TensorBoard log that forgets what an interrupted run wrote after ``step``."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def record(writer: Any, values: dict[str, float], step: int) -> None:
    """Writes numbers to the log, if there is one in this process."""
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)


def refuse_dropout(module: nn.Module) -> None:
    """Refuses layers that draw from the global random state, from which no run can be continued exactly."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ConfigError(f"{name} has dropout {layer.p}, which draws from the global random state: configure dropout=0")
