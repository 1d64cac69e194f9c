"""A call as an object: everything that belongs to one call lives in its :class:`Run`, and the pipeline is not changed by it.

``pipe(...)`` is ``pipe.start(...).result()`` with a progress bar. A run can be stepped by hand, watched, cancelled, and several
runs can share one forward pass: ``evaluate(pipe, run_a.requests() + run_b.requests())``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import SfumatoError, did_you_mean, refuse_unknown
from .conditioning import Conditioning, take_branches
from .guidance import WHOLE, Guidance, Weakening

if TYPE_CHECKING:
    from PIL import Image

    from .adapters import ActiveAdapter
    from .base import DiffusionPipeline
    from .tasks import Task


class RunCancelled(SfumatoError):
    """The run was cancelled before it finished."""


@dataclass(frozen=True)
class Request:
    """One evaluation of the denoiser that a run asks for."""

    latents: torch.Tensor  # its input (N, C, H, W), extra channels included
    timesteps: torch.Tensor  # time of each sample (N,)
    conditioning: Conditioning  # everything else, N samples of each tensor
    weakening: Weakening = WHOLE  # what evaluates it instead of the whole denoiser

    def fits(self, other: Request) -> bool:
        """Whether both can be evaluated in one forward pass."""
        mine, theirs = ((r.latents.shape[1:], r.latents.dtype, r.timesteps.dtype) for r in (self, other))
        return mine == theirs and self.weakening == other.weakening and self.conditioning.fits(other.conditioning)


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Done part, 0 to 1."""
        return self.step / self.steps if self.steps else 1.0


@torch.inference_mode()
def evaluate(pipe: DiffusionPipeline, requests: list[Request]) -> list[torch.Tensor]:
    """Evaluates requests, of one run or of several runs at different steps, in as few forward passes as their shapes allow.

    Returns one prediction per request, in order. All the runs are of this ``pipe``.
    """
    answers: list[torch.Tensor | None] = [None] * len(requests)
    for first, request in enumerate(requests):
        if answers[first] is not None:
            continue
        members = [i for i in range(first, len(requests)) if answers[i] is None and request.fits(requests[i])]
        group = [requests[i] for i in members]
        latents, times = (torch.cat(parts) for parts in ([r.latents for r in group], [r.timesteps for r in group]))
        prediction = pipe.predict(latents, times, Conditioning.cat([r.conditioning for r in group]), request.weakening)
        for i, part in zip(members, prediction.split([len(r.latents) for r in group]), strict=True):
            answers[i] = part
    return [a for a in answers if a is not None]


@functools.cache
def accepted(function: Any) -> frozenset[str]:
    """Argument names of a function, looked up once."""
    return frozenset(inspect.signature(function).parameters)


class Run:
    """All state of one call; the fields below are public, but the last two."""

    def __init__(self, pipe: DiffusionPipeline, args: SimpleNamespace) -> None:
        self.pipe = pipe  # never changed
        self.args = args  # the call's arguments by name
        self.scheduler: Any = pipe.scheduler.fresh()  # this run's own copy
        self.batch = 0  # number of pictures
        self.guidance: Guidance = Guidance()  # how predictions combine
        self.conditioning = Conditioning()  # tensors for the denoiser, all guidance branches stacked along the batch
        self.channels: torch.Tensor | None = None  # extra channels beside the latents, all branches stacked
        self.adapters: list[ActiveAdapter] = []  # what else conditions the denoiser
        self.timesteps = torch.empty(0)  # times of the steps, descending
        self.index = 0  # the next step
        self.latents = torch.empty(0)  # (B, C, h, w), now
        self.denoised: torch.Tensor | None = None  # last prediction of the clean latents, where the scheduler tells
        self.kept: Any = None  # what the task keeps for its later phases
        self.step_options: dict[str, Any] = {}  # keywords of every scheduler step
        self._stop: str | None = None
        self._result: Any = None

    @property
    def task(self) -> Task:
        """The pipeline's task."""
        return self.pipe.task

    @property
    def callback_tensors(self) -> dict[str, Named]:
        """Tensors that step callbacks know by name."""
        adapted = {name: named for adapter in self.pipe.adapters for name, named in adapter.callback_tensors.items()}
        return {**self.task.callback_tensors, **self.pipe.callback_tensors, **adapted}

    @property
    def device(self) -> torch.device:
        """Where this run computes."""
        return self.pipe.device

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(self.index, len(self.timesteps))

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= len(self.timesteps) or self._stop == "interrupted"

    def cancel(self) -> None:
        """Ends the run, from any thread: the step under way finishes, then :class:`RunCancelled` is raised where it runs."""
        self._stop = "cancelled"

    def interrupt(self) -> None:
        """Ends the denoising early, from any thread; :meth:`result` decodes the latents as they are."""
        self._stop = "interrupted"

    def _refuse_cancelled(self) -> None:
        if self._stop == "cancelled":
            raise RunCancelled(f"cancelled after {self.index} of {len(self.timesteps)} steps")

    def _grouped(self) -> dict[Weakening, list[int]]:
        """Branches of the next step by what evaluates them."""
        groups: dict[Weakening, list[int]] = {}
        for branch, weakening in self.guidance.passes(self):
            groups.setdefault(weakening, []).append(branch)
        return groups

    def requests(self) -> list[Request]:
        """What the next step needs evaluated."""
        x, t = self.latents, self.timesteps[self.index]
        if self.task.scales_channels and self.channels is not None:
            x = self.scheduler.scale_model_input(torch.cat([x, self.channels], dim=1), t)
            return [Request(x, t.expand(len(x)), self.conditioning)]
        x = self.scheduler.scale_model_input(x, t)
        groups = self._grouped()
        needed = sorted({branch for branches in groups.values() for branch in branches})
        extras, requests = self._extras(x, needed), []  # once for all that evaluate a branch
        for weakening, branches in groups.items():
            own = extras.branches([needed.index(branch) for branch in branches], len(needed), self.batch)
            requests.append(self._request(x, branches, weakening, own))
        return requests

    def _inputs(self, x: torch.Tensor, branches: list[int]) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """Latents, times and conditioning of branches, stacked along the batch."""
        x = torch.cat([x] * len(branches)) if len(branches) > 1 else x
        return x, self.task.time(self).expand(len(x)), self.conditioning.branches(branches, self.guidance.branches, self.batch)

    def _extras(self, x: torch.Tensor, branches: list[int]) -> Conditioning:
        """What the adapters give the denoiser for the next step."""
        total = Conditioning()
        for adapter in self.adapters if branches else ():
            total = total.plus(adapter.extras(self, *self._inputs(x, branches), branches))
        return total

    def _request(self, x: torch.Tensor, branches: list[int], weakening: Weakening, extras: Conditioning) -> Request:
        x, t, conditioning = self._inputs(x, branches)
        if self.channels is not None:
            channels = self.channels
            if len(branches) < self.guidance.branches:
                channels = take_branches(channels, branches, self.batch)
            x = torch.cat([x, channels], dim=1)
        return Request(x, t, conditioning.plus(extras), weakening)

    @torch.no_grad()
    def advance(self, predictions: list[torch.Tensor]) -> None:
        """Takes the answers to :meth:`requests` and moves one step on."""
        self._refuse_cancelled()
        t = self.timesteps[self.index]
        parts = [part for whole in predictions for part in (whole.split(self.batch) if len(whole) > self.batch else (whole,))]
        out = self.scheduler.step(self.guidance.combine(parts, self), t, self.latents, **self.step_options)
        self.denoised = getattr(out, "denoised", getattr(out, "pred_original_sample", None))
        self.latents = self.task.after_step(self, out.prev_sample).to(self.latents.dtype)
        self._report(t)
        self.index += 1

    def step(self) -> None:
        """Makes one denoising step; a :class:`RunCancelled` if the run was cancelled, a ``RuntimeError`` if no step is left."""
        self._refuse_cancelled()
        if self.done:
            raise RuntimeError(f"all {len(self.timesteps)} steps are made: call `result()`")
        self.advance(evaluate(self.pipe, self.requests()))

    def result(self) -> Any:
        """Makes the steps that are left and returns the pictures."""
        if self._result is None:
            while not self.done:
                self.step()
            self._refuse_cancelled()
            if not self.latents.isfinite().all():
                what = f"NaN or infinite latents in {self.latents.dtype}"
                raise FloatingPointError(f"the denoiser made {what}: load it in float32 or bfloat16")
            with torch.no_grad():
                self._result = self.task.finish(self)
        return self._result

    def preview(self) -> list[Image.Image]:
        """Small, approximate pictures of where the run is, cheap enough for every step."""
        return self.pipe.preview_images(self.latents if self.denoised is None else self.denoised)

    def _report(self, t: torch.Tensor) -> None:
        args = self.args
        if args.callback_on_step_end is not None:
            offered = self.callback_tensors
            given = {name: offered[name].read(self) for name in args.callback_on_step_end_tensor_inputs or ()}
            answer = args.callback_on_step_end(PipelineView(self), self.index, t, dict(given)) or {}
            refuse_unknown(answer, offered, f"this pipeline offers {', '.join(offered)}; a callback returned", ValueError)
            for name, value in answer.items():
                if value is not given.get(name):
                    offered[name].write(self, value)
        if args.callback is not None and self.index % args.callback_steps == 0:
            args.callback(self.index // self.scheduler.order, t, self.pipe.pack(self.latents))


class Named(NamedTuple):
    """A tensor of a run that step callbacks know by name."""

    read: Callable[[Run], torch.Tensor | None]
    write: Callable[[Run, torch.Tensor], None]


def negative(keyword: str) -> Named:
    """The negative prompts' rows of a tensor of the conditioning; ``None`` without two branches."""

    def read(run: Run) -> torch.Tensor | None:
        stacked = run.conditioning.get(keyword)
        return None if stacked is None or run.guidance.branches != 2 else stacked[: run.batch]

    def write(run: Run, value: torch.Tensor) -> None:
        joined = torch.cat([value, run.conditioning[keyword][len(value) :]])
        run.conditioning = run.conditioning.replace(**{keyword: joined})

    return Named(read, write)


def conditioned(keyword: str) -> Named:
    """A tensor of the conditioning, all guidance branches stacked."""
    return Named(
        lambda run: run.conditioning.get(keyword),
        lambda run, value: setattr(run, "conditioning", run.conditioning.replace(**{keyword: value})),
    )


LATENTS = Named(
    lambda run: run.pipe.pack(run.latents),
    lambda run, value: setattr(run, "latents", run.pipe.unpack(value, *run.latents.shape[-2:])),
)
CHANNELS = Named(lambda run: run.channels, lambda run, value: setattr(run, "channels", value))
EMBEDS = conditioned("encoder_hidden_states")
NEGATIVE_EMBEDS = negative("encoder_hidden_states")


class PipelineView:
    """What a step callback gets as the pipeline: reads pass through, and the field's switches act on this run alone.

    ``view._interrupt = True`` ends the run early and decodes; ``view._guidance_scale = 0.0`` turns guidance off from here on.
    """

    __slots__ = ("_run",)
    _run: Run

    def __init__(self, run: Run) -> None:
        object.__setattr__(self, "_run", run)

    def __getattr__(self, name: str) -> Any:
        run = self._run
        match name.removeprefix("_"):
            case "guidance_scale":
                return getattr(run.guidance.of_prompt, "guidance_scale", 1.0)
            case "do_classifier_free_guidance":
                return len(run.guidance.of_prompt.passes(run)) > 1
            case "interrupt":
                return run._stop is not None
            case "num_timesteps":
                return len(run.timesteps)
            case "scheduler":
                return run.scheduler
            case "run":
                return run
        return getattr(run.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        run = self._run
        if name == "_interrupt":
            if value:
                run.interrupt()
        elif name == "_guidance_scale":
            guidance = run.guidance.of_prompt
            if not hasattr(guidance, "guidance_scale"):
                raise AttributeError("this run has no guidance, so its scale cannot be set")
            guidance.guidance_scale = float(value)
        else:
            near = did_you_mean(name, ("_interrupt", "_guidance_scale"))
            raise AttributeError(f"a callback cannot set {name!r} on the pipeline, which other runs share{near}")
