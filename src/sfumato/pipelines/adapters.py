"""Adapters: what else conditions a denoiser, beside its prompt: control networks, T2I-Adapters.

A class names the kinds that it has; a kind makes, for each run, the parts that are at work there. Their outputs reach the denoiser
by name, and those of the same name add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..media.processor import VaeImageProcessor
from ..models.several import Several
from .checks import NUMBERS
from .conditioning import Conditioning, numbered
from .run import Named
from .tasks import per_picture

if TYPE_CHECKING:
    from .run import Run


class ActiveAdapter(Protocol):
    """An adapter at work in one run."""

    def extras(
        self, run: Run, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """What it gives the denoiser for the next step; nothing, at no cost, while it is inactive.

        ``x`` (N, C, H, W) are the scaled latents, without extra channels, of the guidance's ``branches`` stacked along the batch.
        """
        ...


class Adapter:
    """A kind of adapter. ``arguments`` are its call arguments, ``component`` its network's name in the pipeline."""

    name: str = "none"
    arguments: str = ""
    component: str = ""
    image: str = ""  # the argument that holds its picture
    sets_size: bool = False  # whether its picture suggests the result's size
    callback_tensors: Mapping[str, Named] = {}  # what step callbacks know by name

    def adopt(self, network: Any) -> Any:
        """The component that stands for what a caller gave: one network for a list of them."""
        if not isinstance(network, (list, tuple)):
            return network
        several = [cls for cls in Several.__subclasses__() if network and isinstance(network[0], cls.member)]
        if not several:
            raise TypeError(f"{self.component} is a list of {[type(n).__name__ for n in network]}: expected its networks")
        return several[0](list(network))

    def check(self, run: Run) -> None:
        """Refuses arguments that cannot work, before any work is done."""
        if getattr(run.args, self.image) is None:
            raise ValueError(f"{self.image}=None: {self.name} needs its picture (edges, depth, pose ...); pass one")

    def size(self, run: Run) -> tuple[int, int] | None:
        """Height and width of the result that its picture suggests, where the caller gives none."""
        if not self.sets_size:
            return None
        first = getattr(run.args, self.image)
        while isinstance(first, (list, tuple)):
            first = first[0]
        return self.processor(run).get_default_height_width(first)

    def processor(self, run: Run) -> VaeImageProcessor:
        """What turns a picture into the tensor that the network reads."""
        raise NotImplementedError

    def prepare(self, run: Run) -> ActiveAdapter:
        """Sets the adapter up for a run whose conditioning and schedule are known."""
        raise NotImplementedError


GUIDANCE_PARTS = ("control_guidance_start", "control_guidance_end")


def each_of(value: Any, count: int, name: str) -> list[Any]:
    """One value for each of ``count`` networks, from a list of so many or from one for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} control networks: pass one, or one for each")
    return list(value)


@dataclass(frozen=True)
class Control:
    """One control network at work: its pictures, and when and how strongly it acts.

    ``pictures`` (B, 3, H, W) in 0..1, ``kinds`` of each for union networks, ``scale`` a tensor, so that it can change in a compiled
    network; it acts in the part ``start`` to ``end`` of the steps.
    """

    network: Any
    pictures: list[torch.Tensor]
    kinds: list[int] | None
    scale: Any
    start: float
    end: float
    guess: bool

    def acts(self, run: Run) -> bool:
        """Whether it acts at the run's next step."""
        steps = len(run.timesteps)
        return run.index / steps >= self.start and (run.index + 1) / steps <= self.end


class Controls:
    """The control networks of a run."""

    def __init__(self, controls: list[Control]) -> None:
        self.controls = controls

    def extras(
        self, run: Run, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        total = Conditioning()
        for control in self.controls:
            if control.acts(run):
                total = total.plus(run.pipe.control(run, control, x, t, conditioning, branches))
        return dict(total)


def _pictures(run: Run) -> list[list[torch.Tensor]]:
    return [control.pictures for part in run.adapters if isinstance(part, Controls) for control in part.controls]


def _read_pictures(run: Run) -> Any:
    """The control pictures, all guidance branches stacked, or a list of those of several."""
    found = [torch.cat([run.pipe.pack(picture)] * run.guidance.branches) for pictures in _pictures(run) for picture in pictures]
    return found[0] if len(found) == 1 else found


def _write_pictures(run: Run, value: Any) -> None:
    places = [(pictures, i) for pictures in _pictures(run) for i in range(len(pictures))]
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(given) != len(places):
        raise ValueError(f"a callback returned {len(given)} control pictures for {len(places)}: return one tensor for each")
    for (pictures, i), rows in zip(places, given, strict=True):
        pictures[i] = run.pipe.unpack(rows[-run.batch :], *pictures[i].shape[-2:])


class ControlNet(Adapter):
    """Networks that read pictures and steer the denoiser by residuals (arXiv:2302.05543), one or several.

    Args:
        image: Argument of the call that holds their pictures.
        more: Further arguments of the call.
        sets_size: Whether a picture suggests the result's size though the argument is not ``image``.
    """

    name, component = "controlnet", "controlnet"

    def __init__(self, image: str = "control_image", more: str = "guess_mode", sets_size: bool = False) -> None:
        self.image, self.sets_size = image, sets_size or image == "image"
        common = "controlnet_conditioning_scale control_guidance_start control_guidance_end"
        self.arguments = f"{image} {common} {more}"
        self.callback_tensors = {image: Named(_read_pictures, _write_pictures)}

    def networks(self, run: Run) -> list[Any]:
        """The control networks of the pipeline."""
        whole = run.pipe.controlnet
        return whole.members if isinstance(whole, Several) else [whole]

    def check(self, run: Run) -> None:
        super().check(run)
        for network, picture, mode, scale, start, end in self._given(run):
            for value in each_of(scale, len(self._kinds(network, mode, picture)[1]), "controlnet_conditioning_scale"):
                NUMBERS("controlnet_conditioning_scale", value)
            if not 0 <= start < end <= 1:
                raise ValueError(f"control_guidance_start={start!r} and control_guidance_end={end!r} must rise within 0 to 1")

    def _given(self, run: Run) -> list[tuple[Any, ...]]:
        """Each network with what is its own of the arguments: pictures, mode, scale, start and end."""
        columns = [self.networks(run)]
        count, pictures = len(columns[0]), getattr(run.args, self.image)
        if count > 1 and (not isinstance(pictures, (list, tuple)) or len(pictures) != count):
            raise ValueError(f"{self.image} must be a list of {count}, a picture (or a list of them) for each control network")
        # a single network's; a union network has a scale for each kind of picture
        whole = (self.image, "control_mode", "controlnet_conditioning_scale" if "num_control_type" in columns[0][0].config else "")
        for name in (self.image, "control_mode", "controlnet_conditioning_scale", *GUIDANCE_PARTS):
            value = getattr(run.args, name)
            columns.append([value] if count == 1 and name in whole else each_of(value, count, name))
        return list(zip(*columns, strict=True))

    def processor(self, run: Run) -> VaeImageProcessor:
        """What turns a picture into the tensor (1, 3, H, W) that the networks read."""
        return VaeImageProcessor(vae_scale_factor=run.pipe.vae_scale_factor, do_convert_rgb=True, do_normalize=False)

    def prepare(self, run: Run) -> Controls:
        controls = []
        for network, picture, mode, scale, start, end in self._given(run):
            kinds, pictures = self._kinds(network, mode, picture)
            tensors = [self.picture(run, p, network) for p in pictures]
            guess = run.args.guess_mode or bool(network.config.get("global_pool_conditions"))
            controls.append(Control(network, tensors, kinds, scale, start, end, guess))
        return Controls(controls)

    def _kinds(self, network: Any, mode: Any, picture: Any) -> tuple[list[int] | None, list[Any]]:
        """The kinds of a union network's pictures, and the pictures; one picture without a kind for others."""
        if "num_control_type" not in network.config:
            limit = network.config.get("num_mode") or 0  # FLUX.1's union networks
            if limit and mode is not None and not (isinstance(mode, int) and 0 <= mode < limit):
                raise ValueError(f"control_mode={mode!r} must be the kind of the picture, 0 to {limit - 1}")
            return None if mode is None else [mode], [picture]
        kinds = [mode] if isinstance(mode, int) else list(mode or [])
        pictures = list(picture) if isinstance(picture, (list, tuple)) else [picture]
        limit = network.config.num_control_type
        if len(kinds) != len(pictures) or not all(isinstance(k, int) and 0 <= k < limit for k in kinds):
            raise ValueError(f"control_mode={mode!r} must name the kind of each of {len(pictures)} pictures, 0 to {limit - 1}")
        return kinds, pictures

    def picture(self, run: Run, image: Any, network: Any) -> torch.Tensor:
        """A control picture, one for each picture of the run, (B, 3, H, W) in 0..1."""
        tensor = self.processor(run).preprocess(image, **run.task.area(run))
        return per_picture(tensor.to(run.device, run.pipe.compute_dtype), run.batch, "control picture")


class LatentControlNet(ControlNet):
    """Control networks that read their pictures as latents."""

    def processor(self, run: Run) -> VaeImageProcessor:
        return run.pipe.image_processor

    def picture(self, run: Run, image: Any, network: Any) -> torch.Tensor:
        """A control picture as latents, one for each picture of the run, (B, C, h, w)."""
        tensor = per_picture(self.processor(run).preprocess(image, **run.task.area(run)), run.batch, "control picture")
        return run.pipe.control_latents(network, tensor.to(run.device), run).to(run.pipe.compute_dtype)


class ChannelControl(Adapter):
    """A control picture as channels beside the latents, for a denoiser that was trained so."""

    name, arguments, image = "control-channels", "control_image", "control_image"

    def prepare(self, run: Run) -> Controls:
        pipe = run.pipe
        image = pipe.image_processor.preprocess(run.args.control_image, **run.task.area(run))
        image = per_picture(image, run.batch, "control picture").to(run.device)
        latents = pipe.latent_format.encode(image, run.args.generator).to(pipe.compute_dtype)
        run.channels = torch.cat([latents] * run.guidance.branches)
        return Controls([])


class Features:
    """A T2I-Adapter's features (B, C, h, w), computed once for a run, that act in its first ``part``."""

    def __init__(self, features: list[torch.Tensor], part: float) -> None:
        self.features, self.part = features, part

    def extras(
        self, run: Run, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        if run.index >= int(len(run.timesteps) * self.part):
            return {}
        stacked = [torch.cat([feature] * len(branches)) for feature in self.features]
        return numbered("down_intrablock_additional_residuals", stacked)


class T2I(Adapter):
    """A T2I-Adapter, or several (arXiv:2302.08453): features of a picture, added in the U-Net's way down."""

    name, component = "t2i-adapter", "adapter"

    def __init__(self, image: str = "image") -> None:
        self.image, self.sets_size = image, image == "image"
        self.arguments = f"{image} adapter_conditioning_scale adapter_conditioning_factor"

    def processor(self, run: Run) -> VaeImageProcessor:
        network = run.pipe.adapter
        grey = (network.members[0] if isinstance(network, Several) else network).config.in_channels == 1
        colours: dict[str, Any] = {"do_convert_grayscale": True} if grey else {"do_convert_rgb": True}
        return VaeImageProcessor(vae_scale_factor=network.downscale_factor, do_normalize=False, **colours)

    def prepare(self, run: Run) -> Features:
        args, network = run.args, run.pipe.adapter
        height, width = run.task.size(run)
        processor, given, weight = self.processor(run), getattr(args, self.image), args.adapter_conditioning_scale

        def read(image: Any) -> torch.Tensor:
            return processor.preprocess(image, height=height, width=width).to(run.device, network.dtype)

        if isinstance(network, Several):
            count = len(network.members)
            if not isinstance(given, (list, tuple)) or len(given) != count:
                raise ValueError(f"{self.image} must be a list of {count} pictures, one for each T2I-Adapter")
            weights = each_of(weight, count, "adapter_conditioning_scale")
            features = network([read(image) for image in given], weights)
        else:
            features = [weight * feature for feature in network(read(given))]
        spread = [per_picture(f.to(run.pipe.compute_dtype), run.batch, "adapter picture") for f in features]
        return Features(spread, args.adapter_conditioning_factor)
