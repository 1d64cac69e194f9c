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
    def _sibling(cls, name: str) -> type[DiffusionPipeline]:
        start = registry.load(name)
        adapters = [adapter.name for adapter in start.adapters]
        for candidate in registry.pipelines():
            fits = candidate.family == start.family and type(candidate.task) is cls.wanted
            if fits and [adapter.name for adapter in candidate.adapters] == adapters:
                return candidate
        raise ValueError(f"{cls.__name__}: the family of {name} has no {cls.wanted.name} pipeline")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Loads a repository into the class of its family that does this task; see ``DiffusionPipeline.from_pretrained``."""
        access = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        source = Source(pretrained_model_name_or_path, **{k: kwargs[k] for k in access if k in kwargs})
        named = pipeline_class(read_json(source.file(DiffusionPipeline.config_name)))
        return cls._sibling(named.__name__).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """Builds the class for this task from another pipeline's components, without copying any weight."""
        return cls._sibling(type(pipeline).__name__).from_pipe(pipeline, **components)


class AutoPipelineForText2Image(_Auto):
    """Pictures from text, whatever the family."""

    wanted = Task


class AutoPipelineForImage2Image(_Auto):
    """Pictures from a picture and text, whatever the family."""

    wanted = ImageToImage


class AutoPipelineForInpainting(_Auto):
    """Inpainting, whatever the family."""

    wanted = Inpaint
