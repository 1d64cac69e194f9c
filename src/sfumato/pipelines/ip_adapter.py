"""IP-Adapters: pictures as prompts (arXiv:2308.06721): loading, scales, and what a run tells its denoiser of them.

Loading changes the denoiser, which pipelines may share, and is not for the time of a call. Calls change nothing: a run encodes its
pictures and reads the scales when it starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import WeightsError, did_you_mean, refuse_unknown
from ..hub import PathLike, Source
from ..models.ip_projections import MultiIPAdapterImageProjection, build_projection, input_width, reads_face, reads_patches
from ..models.layers.attention import Attention
from ..models.layers.image_prompt import ImagePromptAttention, JointImagePromptAttention, own_layers, prompted_layers
from ..models.layers.joint_attention import JointAttention
from ..weights import assign, read_tensors, weight_patterns
from .checks import NUMBERS, TENSOR
from .conditioning import numbered
from .image import ImagePipeline
from .loading import LoadRequest
from .run import Run
from .tasks import per_picture

File = Mapping[str, Mapping[str, torch.Tensor]]
LOAD = "load one with `pipe.load_ip_adapter(...)`"
_MASKS = "ip_adapter_masks"


class PicturePrompts(ImagePipeline):
    """An image pipeline whose denoiser takes IP-Adapters."""

    adapter_weights: ClassVar[tuple[str, ...]] = ("to_k_ip.weight", "to_v_ip.weight")  # of each attention layer in a file
    adapter_scale: ClassVar[float] = 1.0  # until it is set
    needs_pictures: ClassVar[bool] = True  # whether a loaded IP-Adapter must be given one
    vision_model: ClassVar[str] = "CLIPVisionModelWithProjection"
    attention_keywords: ClassVar[str] = "cross_attention_kwargs"  # the argument that holds masks

    image_encoder: Any
    feature_extractor: Any
    _encoder_of_adapter = False  # whether load_ip_adapter put the image encoder in place

    # --- loading ------------------------------------------------------------------------------------------------------

    def load_ip_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, subfolder: Any = "", weight_name: Any = None,
        image_encoder_folder: str | None = "image_encoder", *, revision: str | None = None, token: str | bool | None = None,
        cache_dir: PathLike | None = None, local_files_only: bool = False, force_download: bool = False,
    ) -> None:  # fmt: skip
        """Loads one IP-Adapter, or several from lists, in place of those loaded before. Not for the time of a call.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, hub repository, or a dictionary with ``"image_proj"`` and
                ``"ip_adapter"``; or a list.
            subfolder, weight_name: Folder inside it, and safetensors file; or a list with one for each IP-Adapter.
            image_encoder_folder: Folder of the vision model, inside ``subfolder``, or with a ``/`` inside the repository. It
                is loaded if the pipeline has none and a file is loaded; ``None`` for not, as FaceID needs none.
            revision, token, cache_dir, local_files_only, force_download: See :class:`~sfumato.hub.Source`.

        Raises:
            ValueError: Lists of different lengths, or a pipeline that takes no picture prompts.
            HubError: Nothing is found under the name.
            WeightsError: A file is a pickle, corrupt, of no known kind, or was made for another network.
        """
        options = (revision, token, cache_dir, local_files_only, force_download)
        self._load_adapters(pretrained_model_name_or_path_or_dict, subfolder, weight_name, options, image_encoder_folder)

    def _load_adapters(
        self, given: Any, subfolder: Any, weight_name: Any, options: tuple[Any, ...], encoder_folder: str | None,
        encoder_source: Source | None = None,
    ) -> None:  # fmt: skip
        """Loads IP-Adapters, and an image encoder from beside the first file, unless it has a source of its own."""
        if "ip_adapter_image" not in self.call_signature.parameters:
            raise ValueError(f"{type(self).__name__} takes no picture prompts: use a pipeline that has ip_adapter_image")
        places = _listed(given)
        folders = _for_each(_listed(subfolder), len(places), "subfolder")
        names = _for_each(_listed(weight_name), len(places), "weight_name")
        wanted = "image_encoder" in self.component_names and self.image_encoder is None
        files, encoder = [], None
        for place, folder, name in zip(places, folders, names, strict=True):
            if isinstance(place, Mapping):
                files.append((_parts(place, "the dictionary"), "the dictionary"))
                continue
            source = Source(place, *options)
            files.append(_read(source, folder or "", name))
            if wanted and encoder is None and encoder_folder is not None:
                beside = encoder_source is None and "/" not in encoder_folder and folder
                place = f"{folder}/{encoder_folder}" if beside else encoder_folder
                encoder = self._load_encoder(encoder_source or source, place)
        attach(self.denoiser, files, self.adapter_weights, self.adapter_scale)
        if encoder is not None:
            self.image_encoder, self._encoder_of_adapter = encoder, True
            if self.feature_extractor is None:
                self.feature_extractor = self.picture_processor(encoder.config.image_size)

    def picture_processor(self, size: int) -> Any:
        """What prepares pictures for a vision model that reads ``size`` x ``size`` pixels."""
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(size=size, crop_size=size)

    def _load_encoder(self, source: Source, folder: str) -> Any:
        place = source.fetch(["*.json", *weight_patterns(None, "model.safetensors")], folder)
        request = LoadRequest(source, None, {"default": self.compute_dtype}, self.device)
        return request.load(place.parent, place.name, "transformers", self.vision_model)

    def unload_ip_adapter(self) -> None:
        """Removes the IP-Adapters, so that the denoiser is what it was, and the image encoder that came with them."""
        detach(self.denoiser)
        if self._encoder_of_adapter:
            self.image_encoder, self._encoder_of_adapter = None, False

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Sets how strongly the IP-Adapters act, in calls that start from now on.

        Args:
            scale: A number; or a dictionary of parts of the U-Net, others being 0: ``{"down": {"block_2": [0.0, 1.0]}, "mid": 0.5,
                "up": 1.0}``, with one number for a block or one for each of its transformers. With masks, a number can be a list
                with one for each picture: ``[[0.7, 0.3]]``. For several IP-Adapters a list with one of these for each.

        Raises:
            ValueError: No IP-Adapter is loaded, or the scales do not fit the network.
        """
        adapters = projections_of(self.denoiser)
        if adapters is None:
            raise ValueError(f"there is no IP-Adapter to scale in this pipeline: {LOAD}")
        count, layers = len(adapters.scales), prompted_layers(self.denoiser)
        given = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
        if len(given) != count:
            raise ValueError(f"scale has {len(given)} values for {count} IP-Adapters: pass a number, or a list with one for each")
        adapters.scales = tuple(self.scales_of_layers(each, list(layers)) for each in given)

    def scales_of_layers(self, scale: Any, names: Sequence[str]) -> tuple[Any, ...]:
        """The scale of each of the attention layers that an IP-Adapter reaches, from what a caller gave for it."""
        return _scales_of_layers(scale, names)

    @property
    def is_ip_adapter_active(self) -> bool:
        """Whether an IP-Adapter is loaded whose scale is not 0 everywhere."""
        adapters = projections_of(self.denoiser)
        return adapters is not None and any(any(_listed(value)) for layers in adapters.scales for value in layers)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def encode_image(
        self, image: Any, device: torch.device | None = None, num_images_per_prompt: int = 1,
        output_hidden_states: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Encodes pictures by the image encoder: embeddings (B, D), or patches (B, N, D), and those of the negative branch.

        Without a picture the embedding is zeros, and patches are those of zeros, as in training.
        """
        pair = self.encode_pictures(image, device, bool(output_hidden_states))
        positive, negative = (x.repeat_interleave(num_images_per_prompt, dim=0) for x in pair)
        return positive, negative

    def encode_pictures(self, image: Any, device: torch.device | None, patches: bool) -> list[torch.Tensor]:
        """The embeddings of pictures, or of their ``patches``, and those of the negative branch."""
        if self.components.get("image_encoder") is None or self.feature_extractor is None:
            remedy = "pass ip_adapter_image_embeds that another pipeline prepared"
            if "image_encoder" in self.components:
                remedy = f"set pipe.image_encoder and pipe.feature_extractor, or {remedy}"
            raise ValueError(f"this pipeline has no image encoder to encode ip_adapter_image with: {remedy}")
        if not isinstance(image, torch.Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        weight = next(self.image_encoder.parameters())
        image = image.to(weight.device, weight.dtype)
        if patches:
            pair = [self.image_encoder(x, output_hidden_states=True).hidden_states[-2] for x in (image, torch.zeros_like(image))]
        else:
            embeds = self.image_encoder(image).image_embeds
            pair = [embeds, torch.zeros_like(embeds)]
        return [x.to(device or self.device) for x in pair]

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image: Any, ip_adapter_image_embeds: Any = None, device: torch.device | None = None,
        num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = False,
    ) -> Any:  # fmt: skip
        """Encodes picture prompts, so that later calls can take them as ``ip_adapter_image_embeds``.

        Returns:
            For each IP-Adapter a tensor (num_images_per_prompt, pictures, ...); under guidance with as many rows more in front, of
            the negative branch.
        """
        adapters = projections_of(self.denoiser)
        if adapters is None:
            raise ValueError(f"there is no IP-Adapter to encode pictures for: {LOAD}")
        layers, branches = adapters.image_projection_layers, 2 if do_classifier_free_guidance else 1
        place: dict[str, Any] = {"device": device or self.device, "dtype": self.compute_dtype}
        found = []
        if ip_adapter_image_embeds is None:
            alone = len(layers) == 1 and not isinstance(ip_adapter_image, (list, tuple))
            pictures = _for_each([ip_adapter_image] if alone else ip_adapter_image, len(layers), "ip_adapter_image")
            for picture, layer in zip(pictures, layers, strict=True):
                positive, negative = self.encode_pictures(picture, device, reads_patches(layer))
                made, read = positive.shape[-1], input_width(layer)
                if made != read and not reads_face(layer):
                    remedy = "set pipe.image_encoder to the one that it was made with, or pass ip_adapter_image_embeds"
                    raise ValueError(f"the image encoder's embeddings are {made} wide, this IP-Adapter reads {read}: {remedy}")
                found.append(torch.stack([negative, positive][-branches:]))
        else:
            given = _for_each(ip_adapter_image_embeds, len(layers), "ip_adapter_image_embeds")
            for embeds, layer in zip(given, layers, strict=True):
                paired = reads_face(layer) and isinstance(embeds, tuple) and len(embeds) == 2
                found.append(_checked_embeds(embeds[0] if paired else embeds, branches, input_width(layer)))
        return [
            torch.cat([part.repeat(num_images_per_prompt, *[1] * (part.dim() - 1)) for part in embeds.to(**place).chunk(branches)])
            for embeds in found
        ]

    # --- the call -----------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        super().check(run)
        args, adapters = run.args, projections_of(self.denoiser)
        keywords = getattr(args, self.attention_keywords) or {}
        refuse_unknown(keywords, (_MASKS,), f"{self.attention_keywords} takes {_MASKS} alone: leave out", ValueError)
        names = [f"{sign}ip_adapter_image" for sign in ("", "negative_")]
        for name in names:
            if getattr(args, name) is not None and getattr(args, f"{name}_embeds") is not None:
                raise ValueError(f"both of {name} and {name}_embeds are given: pass one of them")
        given = [n for name in names for n in (name, f"{name}_embeds") if getattr(args, n) is not None]
        if adapters is None and (given or keywords):
            raise ValueError(f"{(given or list(keywords))[0]} is given, but no IP-Adapter is loaded in this pipeline: {LOAD}")
        if adapters is not None and not given and self.needs_pictures:
            remedy = "pass ip_adapter_image or ip_adapter_image_embeds, or remove it with `pipe.unload_ip_adapter()`"
            raise ValueError(f"an IP-Adapter is loaded, and there is no picture for it: {remedy}")

    def condition(self, run: Run) -> None:
        super().condition(run)
        adapters, args = projections_of(self.denoiser), run.args
        given = args.ip_adapter_image is not None or args.ip_adapter_image_embeds is not None
        if adapters is not None and (given or self.needs_pictures):
            run.conditioning = run.conditioning.replace(**self._image_conditioning(run, adapters))

    def embed_pictures(self, run: Run, guided: bool) -> list[torch.Tensor]:
        """The encoded pictures of a run, (rows, pictures, ...) for each IP-Adapter, those of the negative branch in front."""
        given = run.args.ip_adapter_image, run.args.ip_adapter_image_embeds
        return self.prepare_ip_adapter_image_embeds(*given, run.device, 1, guided)

    def _image_conditioning(self, run: Run, adapters: MultiIPAdapterImageProjection) -> dict[str, torch.Tensor]:
        """What the attention to picture prompts reads, of all guidance branches."""
        args, layout = run.args, run.guidance.layout
        guided, given = "negative" in layout, args.ip_adapter_image_embeds
        listed = given if isinstance(given, (list, tuple)) else ()
        faces = {i: embeds[1] for i, embeds in enumerate(listed) if isinstance(embeds, tuple)}
        tokens = []
        for whole in adapters(self.embed_pictures(run, guided), faces):
            parts = [per_picture(part, run.batch, "picture prompt") for part in whole.chunk(2 if guided else 1)]
            named = dict(zip(("negative", "positive")[-len(parts) :], parts, strict=True))
            tokens.append(torch.cat([named[name] for name in layout]))
        counts, rows = [t.shape[1] for t in tokens], run.batch * len(layout)
        masks = _masks((getattr(args, self.attention_keywords) or {}).get(_MASKS), counts)
        scales = _scale_table(adapters.scales, counts, bool(masks)).to(run.device)  # (L, pictures)
        spread = [m.to(run.device, torch.float32).expand(rows, -1, -1, -1) for m in masks]
        scaled = {"image_scales": scales.expand(rows, -1, -1)}
        return {**numbered("image_tokens", tokens), **numbered("image_masks", spread), **scaled}


# --- the network ------------------------------------------------------------------------------------------------------


def projections_of(network: nn.Module) -> MultiIPAdapterImageProjection | None:
    """The projections of the IP-Adapters that a network has."""
    found = getattr(network, "encoder_hid_proj", None)
    return found if isinstance(found, MultiIPAdapterImageProjection) else None


def attach(network: Any, files: Sequence[tuple[File, str]], names: Sequence[str], scale: float) -> None:
    """Gives a network the IP-Adapters of ``files``, each with where it comes from, in place of those that it has.

    ``names`` are those of the weights of each attention layer.
    """
    if network.encoder_hid_proj is not None and projections_of(network) is None:
        kind = network.config.encoder_hid_dim_type
        raise ValueError(f"this network projects its tokens (encoder_hid_dim_type={kind!r}), and IP-Adapters cannot be added to it")
    layers, like = prompted_layers(network), {"device": network.device, "dtype": network.dtype}
    projections = [build_projection(file["image_proj"], network.dtype, where, _TIMED in names) for file, where in files]
    weights = [_layer_weights(file["ip_adapter"], layers.values(), names, where) for file, where in files]
    changes = [_low_rank(file["ip_adapter"], network, where) for file, where in files]
    processors = [_processor(i, layer, [each[i] for each in weights], network.dtype) for i, layer in enumerate(layers.values())]
    detach(network)
    for layer, processor in zip(layers.values(), processors, strict=True):
        layer.processor = processor.to(network.device)
    scales = tuple((scale,) * len(layers) for _ in files)
    adapters = MultiIPAdapterImageProjection(projections, scales).to(**like).eval()
    for change in changes:
        for name, delta in change.items():
            owner = network.get_submodule(name)
            adapters.replaced.setdefault(name, owner.weight)
            owner.weight = nn.Parameter((owner.weight.float() + delta.to(network.device)).to(network.dtype))
    network.encoder_hid_proj = adapters


_TIMED = "norm_ip.linear.weight"
"""What only layers hold whose IP-Adapters are told the time."""


def _processor(
    i: int, layer: Attention | JointAttention, weights: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype
) -> ImagePromptAttention:
    """The i-th layer's attention to picture prompts, of the weights that each IP-Adapter has for it."""
    contexts, width = [tensors["to_k_ip.weight"].shape[1] for tensors in weights], layer.to_q.out_features
    with torch.device("meta"):
        processor = ImagePromptAttention(i, width, contexts, bias="to_k_ip.bias" in weights[0])
        if _TIMED in weights[0]:
            times = [tensors[_TIMED].shape[1] for tensors in weights]
            processor = JointImagePromptAttention(i, width, contexts, width // layer.heads, times)
    named = {name.replace(".", f".{k}.", 1): tensor for k, tensors in enumerate(weights) for name, tensor in tensors.items()}
    assign(processor, named, dtype, "an IP-Adapter")
    return processor.eval()


def detach(network: Any) -> None:
    """Removes the IP-Adapters of a network, if it has any; it has the same parameters again as before."""
    adapters = projections_of(network)
    if adapters is None:
        return
    for name, parameter in adapters.replaced.items():
        owner = network.get_submodule(name)
        if (parameter.device, parameter.dtype) != (owner.weight.device, owner.weight.dtype):
            parameter = nn.Parameter(parameter.to(owner.weight))
        owner.weight = parameter
    for layer in prompted_layers(network).values():
        del layer.processor
        layer.processor = None
    del network.encoder_hid_proj
    network.encoder_hid_proj = None


# --- files ------------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_XLABS = (
    (r"^ip_adapter_proj_model\.", "image_proj."),
    (r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.", r"ip_adapter.\1.to_\2_ip."),
)
"""Names in files for FLUX -> those of the other files."""


def _read(source: Source, subfolder: str, weight_name: str | None) -> tuple[File, str]:
    if not weight_name:
        raise ValueError(f"weight_name={weight_name!r} must name the file of the IP-Adapter in {source.name}, *.safetensors")
    if PurePath(weight_name).suffix != ".safetensors":
        remedy = "name the repository's .safetensors file, or convert it"
        raise WeightsError(f"{weight_name} is no safetensors file, and pickles, which can run code, are not opened: {remedy}")
    path = source.file(weight_name, subfolder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for original, tensor in read_tensors([path]).items():
        key = original
        for pattern, new in _XLABS:
            key = re.sub(pattern, new, key)
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return _parts(parts, str(path)), str(path)


def _parts(file: File, where: str) -> File:
    if set(file) != {"image_proj", "ip_adapter"}:
        raise WeightsError(f"{where} holds {', '.join(map(repr, sorted(file)[:4]))}, an IP-Adapter 'image_proj' and 'ip_adapter'")
    return file


def _layer_weights(
    tensors: Mapping[str, torch.Tensor], layers: Iterable[Attention | JointAttention], names: Sequence[str], where: str
) -> list[dict[str, torch.Tensor]]:
    """Weights of each layer by name.

    Files for U-Nets number all attention layers, every second of which reads the prompt; those for transformers the joint ones.
    """
    numbers = [i if isinstance(layer, JointAttention) else 2 * i + 1 for i, layer in enumerate(layers)]
    wanted = {f"{number}.{name}" for number in numbers for name in names}
    if differing := wanted.symmetric_difference(name for name in tensors if "_lora." not in name):
        what = f"{where} and this network differ in {len(differing)} attention weights, such as {min(differing)!r}"
        raise WeightsError(f"{what}: it was made for another network (SD 1.5, SDXL, SD 3, FLUX ...)")
    return [{name: tensors[f"{number}.{name}"] for name in names} for number in numbers]


_LOW_RANK = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}


def _low_rank(tensors: Mapping[str, torch.Tensor], network: nn.Module, where: str) -> dict[str, torch.Tensor]:
    """What FaceID's files add to the attention's own weights, by the name of the layer: products of low rank (arXiv:2106.09685)."""
    attentions = list(own_layers(network))
    changes = {}
    for key, down in tensors.items():
        if not key.endswith("_lora.down.weight"):
            continue
        number, kind = key.split(".")[:2]
        up = tensors.get(f"{number}.{kind}.up.weight")
        if up is None or int(number) >= len(attentions) or kind not in _LOW_RANK:
            raise WeightsError(f"{where}: {key!r} has no counterpart in the file or in this network: download it again")
        name = f"{attentions[int(number)]}.{_LOW_RANK[kind]}"
        changes[name] = up.float() @ down.float()
        expected = tuple(network.get_submodule(name).weight.shape)  # type: ignore[arg-type]
        if tuple(changes[name].shape) != expected:
            raise WeightsError(f"{where}: {key!r} makes a change of shape {tuple(changes[name].shape)}, expected {expected}")
    return changes


# --- scales, embeddings, masks ----------------------------------------------------------------------------------------


def _place(name: str) -> tuple[str, str, int]:
    """Part, block and transformer of an attention layer, ``down_blocks.1.attentions.0.transformer_blocks.0.attn2``."""
    words = name.split(".")
    part = words[0].partition("_")[0]
    return part, "block_0" if part == "mid" else f"block_{words[1]}", int(words[words.index("attentions") + 1])


def _scales_of_layers(scale: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The scale of each attention layer."""
    places = [_place(name) for name in names]
    if not isinstance(scale, Mapping):
        return (checked_scale(scale),) * len(places)
    parts = {place[0] for place in places}
    refuse_unknown(scale, parts, f"the scale of an IP-Adapter is by {', '.join(sorted(parts))}; it has", ValueError)
    found: list[Any] = [0.0] * len(places)
    for part, value in scale.items():
        blocks = sorted({place[1] for place in places if place[0] == part})
        by_block = value if isinstance(value, Mapping) else dict.fromkeys(blocks, value)
        for block, each in by_block.items():
            inside = [i for i, place in enumerate(places) if place[:2] == (part, block)]
            if not inside:
                near = did_you_mean(str(block), blocks)
                raise ValueError(
                    f"scale[{part!r}] names {block!r}, which has no attention to pictures: {', '.join(blocks)} do{near}"
                )
            count = 1 + max(places[i][2] for i in inside)
            values = list(each) if isinstance(each, (list, tuple)) else [each]
            if len(values) not in (1, count):
                raise ValueError(
                    f"scale[{part!r}][{block!r}] has {len(values)} values for {count} transformers: pass one, or {count}"
                )
            for i in inside:
                found[i] = checked_scale(values[places[i][2] % len(values)])
    return tuple(found)


def checked_scale(value: Any) -> Any:
    """A number, or a tuple of one for each picture."""
    found = NUMBERS("scale", value)
    return tuple(found) if isinstance(found, (list, tuple)) else found


def _scale_table(scales: Sequence[Sequence[Any]], counts: Sequence[int], masked: bool) -> torch.Tensor:
    """The weight of each picture in each layer, (L, pictures of all IP-Adapters)."""
    columns = []
    for i, (layers, count) in enumerate(zip(scales, counts, strict=True)):
        for value in layers:
            if isinstance(value, tuple) and (not masked or len(value) != count):
                remedy = "pass one for each of its pictures and " + _MASKS if not masked else f"pass {count}, one for each picture"
                raise ValueError(f"IP-Adapter {i} has a scale for each of {len(value)} pictures: {remedy}")
        columns.append(torch.tensor([value if isinstance(value, tuple) else (value,) * count for value in layers]))
    return torch.cat(columns, dim=1).float()


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        what = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {what} for {count} IP-Adapters: pass a list with one for each, or lists in it of pictures")
    return list(value)


def _checked_embeds(embeds: Any, branches: int, width: int) -> torch.Tensor:
    name = "ip_adapter_image_embeds"
    TENSOR(name, embeds)
    if embeds.dim() not in (3, 4) or embeds.shape[-1] != width:
        raise ValueError(f"{name} holds {tuple(embeds.shape)}, expected (rows, pictures, {width}) or (rows, pictures, N, {width})")
    if len(embeds) % branches:
        raise ValueError(f"{name} has {len(embeds)} rows: under guidance it needs the negative ones, then as many positive ones")
    return embeds


def _masks(masks: Any, counts: Sequence[int]) -> list[torch.Tensor]:
    """Where the pictures of each IP-Adapter act, (1, pictures, H, W) each; none for everywhere."""
    if masks is None:
        return []
    found = list(masks.unsqueeze(1)) if isinstance(masks, torch.Tensor) else masks
    for mask, count in zip(_for_each(found, len(counts), _MASKS), counts, strict=True):
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[:2] != (1, count):
            what = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"{_MASKS} holds {what}, expected (1, {count}, H, W): one mask for each picture, IPAdapterMaskProcessor"
            )
    return found
