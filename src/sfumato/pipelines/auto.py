"""``AutoPipelineFor...``: the class of a family that does the wanted task."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import registry
from ..config import read_json
from ..hub import PathLike, Source
from .base import DiffusionPipeline
from .loading import pipeline_class
from .tasks import ImageToImage, Inpaint, Task


class _Auto:
    """Finds the sibling of a pipeline class, in the same family, that does ``wanted``."""

    wanted: ClassVar[type[Task]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is not built directly: use `from_pretrained` or `from_pipe`")

    @classmethod
    def _sibling(cls, name: str, perturbed: bool | None, steered: bool) -> type[DiffusionPipeline]:
        start = registry.load(name)
        if perturbed is None:
            perturbed = has_pag(start)
        adapters = ["controlnet"] if steered else [adapter.name for adapter in start.adapters]
        for candidate in registry.pipelines():
            fits = candidate.family == start.family and type(candidate.task) is cls.wanted and has_pag(candidate) == perturbed
            if fits and [adapter.name for adapter in candidate.adapters] == adapters:
                return candidate
        lacks = " with perturbed-attention guidance: pass enable_pag=False" if perturbed else ""
        raise ValueError(f"{cls.__name__}: the family of {name} has no {cls.wanted.name} pipeline{lacks}")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: PathLike, *, enable_pag: bool | None = None, **kwargs: Any
    ) -> DiffusionPipeline:
        """Loads a repository into the class of its family that does this task; see ``DiffusionPipeline.from_pretrained``.

        ``enable_pag`` chooses the class with or without perturbed-attention guidance; as the repository says when not given. With
        ``controlnet`` it is the class with ControlNets.
        """
        access = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        source = Source(pretrained_model_name_or_path, **{k: kwargs[k] for k in access if k in kwargs})
        name = pipeline_class(read_json(source.file(DiffusionPipeline.config_name))).__name__
        return cls._sibling(name, enable_pag, "controlnet" in kwargs).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, *, enable_pag: bool | None = None, **components: Any) -> DiffusionPipeline:
        """Builds the class for this task from another pipeline's components, without copying any weight.

        ``enable_pag`` is as in :meth:`from_pretrained`.
        """
        return cls._sibling(type(pipeline).__name__, enable_pag, "controlnet" in components).from_pipe(pipeline, **components)


def has_pag(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline class has perturbed-attention guidance as call arguments."""
    return "pag_applied_layers" in pipeline.options


class AutoPipelineForText2Image(_Auto):
    """Pictures from text, whatever the family."""

    wanted = Task


class AutoPipelineForImage2Image(_Auto):
    """Pictures from a picture and text, whatever the family."""

    wanted = ImageToImage


class AutoPipelineForInpainting(_Auto):
    """Inpainting, whatever the family."""

    wanted = Inpaint
