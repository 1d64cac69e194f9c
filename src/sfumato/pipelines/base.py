"""The pipeline: named components, how they are loaded, saved and moved, and the call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import FORMAT_VERSION, FrozenConfig
from ..errors import ConfigError, did_you_mean
from ..hub import PathLike, Source
from ..models.base import single_device
from . import loading, params
from .conditioning import Conditioning
from .run import Run
from .tasks import Task

_P = TypeVar("_P", bound="DiffusionPipeline")


class DiffusionPipeline:
    """Components plus a task, run by one denoising loop.

    A public pipeline is a class statement that names a family and a task:
    ``class StableDiffusionPipeline(StableDiffusion, task=TextToImage(), call="prompt height ...")``.

    Class attributes:
        component_names: Components in constructor order.
        optional_components: Those that may be ``None``.
        options: Constructor options that are not components, with their defaults.
        task: What the pipeline does.
        call_signature: Its call arguments.
    """

    if TYPE_CHECKING:  # components and what a family provides

        def __getattr__(self, name: str) -> Any: ...

    config_name: ClassVar[str] = "model_index.json"
    component_names: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    task: ClassVar[Task] = Task()
    call_signature: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls,
        task: Task | None = None,
        call: str | None = None,
        extra: str = "",
        defaults: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            cls.task = task
        if call is not None:
            cls.call_signature = params.build_signature(call, extra, defaults)
            cls.__call__ = _call_with(cls.call_signature, cls.__doc__ or "")  # type: ignore[method-assign]
        cls.__signature__ = inspect.Signature(_constructor_parameters(cls))  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        names = [*cls.component_names, *cls.options]
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes {len(names)} arguments ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TypeError(f"{cls.__name__}() has no argument {name!r}{did_you_mean(name, names)}")
            if name in given:
                raise TypeError(f"{cls.__name__}() got {name!r} twice")
            given[name] = value
        missing = [n for n in cls.component_names if n not in given and n not in cls.optional_components]
        if missing:
            raise TypeError(f"{cls.__name__}() lacks the component(s) {', '.join(missing)}")
        self._options = {name: given.get(name, default) for name, default in cls.options.items()}
        self._name_or_path: str | None = None
        self._progress: dict[str, Any] = {}
        for name in cls.component_names:
            setattr(self, name, given.get(name))
        self.adopt()

    def adopt(self) -> None:
        """Adjusts fresh components to this family's conventions. Runs once, in the constructor."""

    # --- components -------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """Components by name; ``Other(**pipe.components)`` shares them."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def config(self) -> FrozenConfig:
        """What ``model_index.json`` says of this pipeline."""
        described = {name: loading.describe(component) for name, component in self.components.items()}
        own = {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}
        if self._name_or_path:
            own["_name_or_path"] = self._name_or_path
        return FrozenConfig({**own, **self._options, **described})

    def modules(self) -> dict[str, nn.Module]:
        """Components that are networks."""
        return {name: c for name, c in self.components.items() if isinstance(c, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for m in self.modules().values() for p in m.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the networks."""
        floats = (p.dtype for m in self.modules().values() for p in m.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def to(self: _P, *args: Any, **kwargs: Any) -> _P:
        """Moves or converts every network: ``to("cuda")``, ``to(torch.float16)``, ``to("cuda", torch.float16)``."""
        for module in self.modules().values():
            module.to(*args, **kwargs)
        return self

    # --- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[_P],
        pretrained_model_name_or_path: PathLike,
        *,
        variant: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool = True,
        **components: Any,
    ) -> _P:
        """Loads a pipeline from a folder or a hub repository, written by this library or by the reference.

        Called on :class:`DiffusionPipeline` it returns the class that the repository names; called on a class it returns that
        class, so that one repository serves several tasks.

        Args:
            pretrained_model_name_or_path: Folder or ``owner/repository``.
            variant: File variant, such as ``"fp16"``; components without it load their plain files.
            dtype: Floating-point type, float32 when not given, or a dictionary by component name (with ``"default"``).
                ``torch_dtype`` is the same argument.
            device_map: Device to load to.
            revision: Branch, tag or commit.
            token: Hub access token.
            cache_dir: Hub cache folder.
            local_files_only: Never use the network.
            force_download: Fetch again what is cached.
            use_safetensors: Must be true: pickle files are not read.
            **components: Ready components by name, or ``None`` for an optional one to leave out.

        Raises:
            HubError: Nothing is found under the name.
            ConfigError: ``model_index.json`` does not fit the class.
            WeightsError: Weights are missing, corrupt, pickled, or do not fit.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for pickle weights, which can run code; convert them to safetensors")
        source = Source(pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, force_download)
        request = loading.LoadRequest(source, variant, loading.dtypes(dtype, torch_dtype), single_device(device_map))
        index = request.read_index(cls.config_name)
        chosen: type[Any] = cls if cls.component_names else loading.pipeline_class(index)
        return chosen._from_index(request, index, components)

    @classmethod
    def _from_index(cls: type[_P], request: loading.LoadRequest, index: dict[str, Any], given: dict[str, Any]) -> _P:
        for name in given:
            if name not in cls.component_names and name not in cls.options:
                known = (*cls.component_names, *cls.options)
                raise TypeError(f"{cls.__name__}.from_pretrained has no argument or component {name!r}{did_you_mean(name, known)}")
        options = {name: given.pop(name, index.get(name, default)) for name, default in cls.options.items()}
        for name in request.dtypes:
            if name not in (*cls.component_names, "default"):
                raise ValueError(f"dtype names {name!r}, no component of {cls.__name__}{did_you_mean(name, cls.component_names)}")
        entries = {n: index.get(n) or [None, None] for n in cls.component_names}
        for name, entry in entries.items():
            if not (isinstance(entry, list) and (entry[:1] == [None] or [type(e) for e in entry[:2]] == [str, str])):
                raise ConfigError(f"{cls.config_name} of {request.source.name}: {name!r} is {entry!r}, expected [library, class]")
        wanted = [n for n, entry in entries.items() if n not in given and entry[0] is not None]
        lacking = [n for n in cls.component_names if n not in given and n not in wanted and n not in cls.optional_components]
        if lacking:
            raise ConfigError(
                f"{request.source.name} has no {lacking[0]!r}, which {cls.__name__} needs: pass {lacking[0]}=..., or use the class "
                f"that the repository names, {index.get('_class_name')}"
            )
        folder = request.fetch({name: index[name] for name in wanted})
        loaded = {name: request.load(folder, name, *index[name][:2]) for name in wanted}
        for name, component in given.items():
            if component is None and name not in cls.optional_components:
                raise ValueError(f"{name}=None: {cls.__name__} cannot work without its {name}")
        pipe = cls(**loaded, **given, **options)
        pipe._name_or_path = str(request.source.name)
        return pipe

    def save_pretrained(
        self,
        save_directory: PathLike,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes every component into its folder and, last, ``model_index.json``; the reference loads the result.

        Args:
            save_directory: Folder, made if needed.
            variant: File variant, such as ``"fp16"``; the parameters are written as they are.
            max_shard_size: Bytes, or text such as ``"5GB"``; larger weights are split.
            safe_serialization: Must be true: pickle files are not written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for pickle weights; only safetensors is written")
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"save_directory={str(folder)!r} is a file; pass a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, component in self.components.items():
            if component is not None:
                loading.save_component(component, folder / name, variant, max_shard_size)
        loading.write_index(folder / self.config_name, self.config)

    @classmethod
    def from_pipe(cls: type[_P], pipeline: DiffusionPipeline, **components: Any) -> _P:
        """Builds this pipeline from another one's components, without copying any weight.

        Args:
            pipeline: Another pipeline.
            **components: Components or options that replace its own, or that it lacks.
        """
        theirs = {**pipeline.components, **pipeline._options}
        known = (*cls.component_names, *cls.options)
        for name in components:
            if name not in known:
                raise TypeError(f"{cls.__name__}.from_pipe has no component {name!r}{did_you_mean(name, known)}")
        merged = {**{k: v for k, v in theirs.items() if k in known}, **components}
        missing = [n for n in cls.component_names if merged.get(n) is None and n not in cls.optional_components]
        if missing:
            raise ValueError(f"{type(pipeline).__name__} has no {missing[0]!r}, which {cls.__name__} needs: pass {missing[0]}=...")
        pipe = cls(**merged)
        pipe._name_or_path = pipeline._name_or_path
        return pipe

    # --- the call ---------------------------------------------------------------------------------------------------

    def start(self, *args: Any, **kwargs: Any) -> Run:
        """Sets a call up, with the arguments of the call, and returns its :class:`Run` before the first step."""
        return self._start(params.bind(type(self).__name__, self.call_signature, args, kwargs))

    @torch.no_grad()
    def _start(self, arguments: SimpleNamespace) -> Run:
        run = Run(self, arguments)
        self.task.check(run)
        self.check(run)
        self.condition(run)
        self.task.schedule(run)
        self.task.prepare(run)
        return run

    def _finish_with_progress(self, run: Run) -> Any:
        with self.progress_bar(total=len(run.timesteps)) as bar:
            while not run.done:
                run.step()
                bar.update()
        return run.result()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """A progress bar with this pipeline's settings."""
        return tqdm(iterable, total=total, **self._progress)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Sets the keywords of the progress bar, such as ``disable=True``."""
        self._progress = settings

    # --- what a family provides -------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        """Refuses arguments that this family cannot work with."""

    def condition(self, run: Run) -> None:
        """Sets the run's batch size, guidance and conditioning."""
        raise TypeError(f"{type(self).__name__} is no runnable pipeline: use one of its public classes")

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Evaluates the denoiser.

        Args:
            x: Its input (N, C, H, W).
            t: Time of each sample (N,).
            conditioning: Everything else.
        """
        raise TypeError(f"{type(self).__name__} is no runnable pipeline: use one of its public classes")


def _constructor_parameters(cls: type[DiffusionPipeline]) -> list[inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    empty = inspect.Parameter.empty
    first_optional = len(cls.component_names)
    while first_optional and cls.component_names[first_optional - 1] in cls.optional_components:
        first_optional -= 1
    parameters = [
        inspect.Parameter(n, kind, default=None if i >= first_optional else empty) for i, n in enumerate(cls.component_names)
    ]
    return parameters + [inspect.Parameter(n, kind, default=d) for n, d in cls.options.items()]


def _call_with(signature: inspect.Signature, summary: str) -> Any:
    """Makes the ``__call__`` of a public class: its signature and documentation come from the catalogue."""

    def __call__(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return self._finish_with_progress(self.start(*args, **kwargs))

    __call__.__signature__ = signature  # type: ignore[attr-defined]
    __call__.__doc__ = f"{summary.splitlines()[0] if summary else ''}\n\n{params.document(signature)}"
    return __call__
