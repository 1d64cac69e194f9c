"""The pipeline: named components, how they are loaded, saved and moved, and the call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import weights
from ..config import FORMAT_VERSION, FrozenConfig
from ..errors import ConfigError, did_you_mean, refuse_unknown
from ..hub import PathLike, Source
from ..models.base import ModelMixin, single_device
from . import loading, params
from .adapters import Adapter
from .conditioning import Conditioning
from .guidance import WHOLE, Weakening
from .run import Named, Run
from .tasks import Task

_P = TypeVar("_P", bound="DiffusionPipeline")


class DiffusionPipeline:
    """Components plus a task and adapters, run by one denoising loop.

    A public pipeline is a class statement that names a family, a task and adapters:
    ``class StableDiffusionControlNetPipeline(StableDiffusion, task=Task(), adapters=(ControlNet(),))``. Its call arguments are
    those of the three, in the order of the family; those named in ``later``, and ``extra`` ones, are keyword-only. A class that
    goes its own way states them all in ``call``.

    Class attributes:
        component_names: Components in constructor order; ``optional_components`` may be ``None``.
        options: Constructor options that are not components, with their defaults.
        family: What the model is called; pipelines of one family share their components.
        order, arguments: Of a family: the order of all call arguments, and those that every task of it has.
        adapters_before: Of a family: the component before which those of adapters stand in the constructor.
        callback_tensors: Of a family: tensors that step callbacks know by name, beside the task's.
        task, adapters: What the pipeline does, and by what means; ``call_signature`` are its call arguments.
    """

    if TYPE_CHECKING:  # components and what a family provides
        scheduler: Any

        def __getattr__(self, name: str) -> Any: ...

    config_name: ClassVar[str] = "model_index.json"
    component_names: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    family: ClassVar[str] = ""
    order: ClassVar[str] = ""
    arguments: ClassVar[str] = ""
    adapters_before: ClassVar[str] = ""
    task: ClassVar[Task] = Task()
    adapters: ClassVar[tuple[Adapter, ...]] = ()
    call_signature: ClassVar[inspect.Signature]
    callback_tensors: ClassVar[Mapping[str, Named]] = {}

    def __init_subclass__(
        cls, task: Task | None = None, adapters: tuple[Adapter, ...] = (), call: str | None = None, later: str = "",
        extra: str = "", defaults: Mapping[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init_subclass__(**kwargs)
        if task is not None:
            cls.task, cls.adapters = task, adapters
            if "component_names" not in vars(cls):
                names = list(cls.component_names)
                place = names.index(cls.adapters_before) if adapters else 0
                names[place:place] = dict.fromkeys(a.component for a in adapters if a.component)
                cls.component_names = tuple(names)
            if call is None:
                call, extra = cls._composed_call(later.split(), extra)
        if call is not None:
            cls.call_signature = params.build_signature(call, extra, defaults)
            cls.__call__ = _call_with(cls.call_signature, cls.__doc__ or "")  # type: ignore[method-assign]
        cls.__signature__ = inspect.Signature(_constructor_parameters(cls))  # type: ignore[attr-defined]

    @classmethod
    def _composed_call(cls, later: list[str], extra: str) -> tuple[str, str]:
        """Positional and keyword-only arguments of family, task and adapters."""
        parts = [cls.arguments, cls.task.arguments, *(adapter.arguments for adapter in cls.adapters)]
        wanted = dict.fromkeys(name for part in parts for name in part.split())
        first = [name for name in cls.order.split() if name in wanted and name not in later]
        rest = [name for name in (*wanted, *extra.split()) if name not in first]
        return " ".join(first), " ".join(dict.fromkeys(rest))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        names = [*cls.component_names, *cls.options]
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes {len(names)} arguments ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        refuse_unknown(kwargs, names, f"{cls.__name__}() has no argument")
        for name in given.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__}() got {name!r} twice")
        given |= kwargs
        missing = [n for n in cls.component_names if n not in given and n not in cls.optional_components]
        if missing:
            raise TypeError(f"{cls.__name__}() lacks the component(s) {', '.join(missing)}")
        for adapter in (a for a in cls.adapters if a.component):
            given[adapter.component] = adapter.adopt(given[adapter.component])
        loading.check_kinds({name: given.get(name) for name in cls.component_names})
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
        origin = {"_name_or_path": self._name_or_path} if self._name_or_path else {}
        return FrozenConfig({**own, **origin, **self._options, **described})

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

    def set_attention_backend(self, backend: str) -> None:
        """Lets a backend compute the attention of every network but CLIP's; see ``ModelMixin.set_attention_backend``."""
        for module in self.modules().values():
            if isinstance(module, ModelMixin):
                module.set_attention_backend(backend)

    # --- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[_P], pretrained_model_name_or_path: PathLike, *, variant: str | None = None, dtype: Any = None,
        torch_dtype: Any = None, device_map: Any = None, revision: str | None = None, token: str | bool | None = None,
        cache_dir: PathLike | None = None, local_files_only: bool = False, force_download: bool = False,
        use_safetensors: bool = True, **components: Any,
    ) -> _P:  # fmt: skip
        """Loads a pipeline from a folder or a hub repository, written by this library or by the reference.

        Called on :class:`DiffusionPipeline` it returns the class that the repository names; called on a class it returns that
        class, so that one repository serves several tasks. :class:`~sfumato.hub.Source` explains the options not listed here.

        Args:
            pretrained_model_name_or_path: Folder or ``owner/repository``.
            variant: File variant, such as ``"fp16"``; components without it load their plain files.
            dtype: Floating-point type, float32 when not given, or a dictionary by component name (with ``"default"``).
                ``torch_dtype`` is the same argument.
            device_map: Device to load to.
            **components: Ready components by name, or ``None`` for one to leave out: a pipeline without its denoiser and
                autoencoder encodes prompts, one without text encoders and autoencoder makes latents of encoded prompts.

        Raises:
            HubError: Nothing is found under the name.
            ConfigError: ``model_index.json`` does not fit the class.
            WeightsError: Weights are missing, corrupt, pickled, or do not fit.
        """
        weights.refuse_pickle(use_safetensors)
        source = Source(pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, force_download)
        request = loading.LoadRequest(source, variant, loading.dtypes(dtype, torch_dtype), single_device(device_map))
        index = request.read_index(cls.config_name)
        chosen: type[Any] = cls if cls.component_names else loading.pipeline_class(index)
        return chosen._from_index(request, index, components)

    @classmethod
    def _from_index(cls: type[_P], request: loading.LoadRequest, index: dict[str, Any], given: dict[str, Any]) -> _P:
        names = cls.component_names
        refuse_unknown(given, (*names, *cls.options), f"{cls.__name__}.from_pretrained has no argument or component")
        for name in request.dtypes.keys() - {*names, "default"}:
            raise ValueError(f"dtype names {name!r}, no component of {cls.__name__}{did_you_mean(name, names)}")
        loading.check_kinds(given)
        options = {name: given.pop(name, index.get(name, default)) for name, default in cls.options.items()}
        entries = {n: index.get(n) or [None, None] for n in names}
        for name, entry in entries.items():
            if not (isinstance(entry, list) and (entry[:1] == [None] or [type(e) for e in entry[:2]] == [str, str])):
                raise ConfigError(f"{cls.config_name} of {request.source.name}: {name!r} is {entry!r}, expected [library, class]")
        wanted = [n for n, entry in entries.items() if n not in given and entry[0] is not None]
        for name in names:
            if name not in given and name not in wanted and name not in cls.optional_components:
                remedy = f"pass {name}=..., or use the class that the repository names, {index.get('_class_name')}"
                raise ConfigError(f"{request.source.name} has no {name!r}, which {cls.__name__} needs: {remedy}")
        folder = request.fetch({name: index[name] for name in wanted})
        loaded = {name: request.load(folder, name, *index[name][:2]) for name in wanted}
        pipe = cls(**loaded, **given, **options)
        pipe._name_or_path = str(request.source.name)
        return pipe

    def save_pretrained(
        self, save_directory: PathLike, *, variant: str | None = None, max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Writes every component into its folder, and ``model_index.json``; the reference loads the result.

        A failure or an interruption while the files are written leaves an older pipeline in the folder as it was.

        The arguments are those of a network's ``save_pretrained``.
        """
        folder = weights.output_folder(save_directory, safe_serialization)
        loading.save_components(self.components, self.config, folder, variant=variant, max_shard_size=max_shard_size)

    @classmethod
    def from_pipe(cls: type[_P], pipeline: DiffusionPipeline, **components: Any) -> _P:
        """Builds this pipeline from another one's components, or those given in their place, without copying any weight."""
        theirs = {**pipeline.components, **pipeline._options}
        known = (*cls.component_names, *cls.options)
        refuse_unknown(components, known, f"{cls.__name__}.from_pipe has no component")
        merged = {**{k: v for k, v in theirs.items() if k in known}, **components}
        for name in cls.component_names:
            if merged.get(name) is None and name not in cls.optional_components:
                raise ValueError(f"{type(pipeline).__name__} has no {name!r}, which {cls.__name__} needs: pass {name}=...")
        pipe = cls(**merged)
        pipe._name_or_path = pipeline._name_or_path
        return pipe

    # --- the call ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, *args: Any, **kwargs: Any) -> Run:
        """Sets a call up, with the arguments of the call, and returns its :class:`Run` before the first step."""
        run = Run(self, params.bind(type(self).__name__, self.call_signature, args, kwargs))
        self.task.check(run)
        self.check(run)
        for adapter in self.adapters:
            adapter.check(run)
        self.condition(run)
        run.guidance = run.guidance.bound(self)
        self.task.schedule(run)
        run.adapters = [adapter.prepare(run) for adapter in self.adapters]
        self.task.prepare(run)
        return run

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """A progress bar with this pipeline's settings."""
        return tqdm(iterable, total=total, **self._progress)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Sets the keywords of the progress bar, such as ``disable=True``."""
        self._progress = settings

    # --- what a family provides -------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        """Refuses arguments that this family cannot work with."""

    def schedule_options(self, run: Run, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the scheduler's ``set_timesteps``, from those ``given`` by the caller or by the number of steps."""
        return given

    def limit(self, run: Run) -> None:
        """Leaves out steps at the end of the run's schedule."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) in the form that callers see."""
        return latents

    def unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Undoes :meth:`pack`, for latents of this height and width."""
        return latents

    def condition(self, run: Run) -> None:
        """Sets the run's batch size, guidance and conditioning."""
        raise TypeError(f"{type(self).__name__} is no runnable pipeline: use one of its public classes")

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        """Evaluates the denoiser, perhaps weakened, on its input ``x`` (N, C, H, W) and the time ``t`` (N,) of each sample."""
        raise TypeError(f"{type(self).__name__} is no runnable pipeline: use one of its public classes")


def _constructor_parameters(cls: type[DiffusionPipeline]) -> list[inspect.Parameter]:
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    required = max((i + 1 for i, n in enumerate(cls.component_names) if n not in cls.optional_components), default=0)
    defaults = [(n, empty if i < required else None) for i, n in enumerate(cls.component_names)]
    return [inspect.Parameter(n, kind, default=default) for n, default in (*defaults, *cls.options.items())]


def _call_with(signature: inspect.Signature, summary: str) -> Any:
    """Makes the ``__call__`` of a public class: its signature and documentation come from the catalogue."""

    def __call__(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        run = self.start(*args, **kwargs)
        with self.progress_bar(total=len(run.timesteps)) as bar:
            while not run.done:
                run.step()
                bar.update()
        return run.result()

    __call__.__signature__ = signature  # type: ignore[attr-defined]
    __call__.__doc__ = f"{summary.splitlines()[0] if summary else ''}\n\n{params.document(signature)}"
    return __call__
