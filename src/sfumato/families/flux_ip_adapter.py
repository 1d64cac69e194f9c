"""IP-Adapters of FLUX.1: pictures as prompts of the joint blocks (XLabs' checkpoints; arXiv:2308.06721).

Quirk, kept because it changes the result of valid calls: if only one of the branches has a picture, the other's is black.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..hub import PathLike, Source
from ..pipelines.ip_adapter import projections_of
from ..pipelines.run import Run
from .flow import FlowFamily


class FluxPicturePrompts(FlowFamily):
    """What differs from other IP-Adapters: where the encoder is, biases, pictures of the negative branch."""

    adapter_weights = ("to_k_ip.weight", "to_k_ip.bias", "to_v_ip.weight", "to_v_ip.bias")

    def load_ip_adapter(  # type: ignore[override]
        self, pretrained_model_name_or_path_or_dict: Any, weight_name: Any = None, subfolder: Any = "",
        image_encoder_pretrained_model_name_or_path: PathLike | None = "image_encoder", image_encoder_subfolder: str = "", *,
        revision: str | None = None, token: str | bool | None = None, cache_dir: PathLike | None = None,
        local_files_only: bool = False, force_download: bool = False,
    ) -> None:  # fmt: skip
        """Loads one IP-Adapter, or several from lists, in place of those loaded before. Not for the time of a call.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, hub repository, or a dictionary with ``"image_proj"`` and
                ``"ip_adapter"``; or a list.
            weight_name, subfolder: Safetensors file, and its folder inside; or a list with one for each IP-Adapter.
            image_encoder_pretrained_model_name_or_path: Folder or repository of the CLIP vision model, or without a ``/`` a folder
                beside the file. It is loaded if the pipeline has none and a file is loaded; ``None`` for not.
            image_encoder_subfolder: Folder inside that.
            revision, token, cache_dir, local_files_only, force_download: See :class:`~sfumato.hub.Source`.

        Raises:
            ValueError, HubError, WeightsError: As for a U-Net.
        """
        options = (revision, token, cache_dir, local_files_only, force_download)
        place, source = image_encoder_pretrained_model_name_or_path, None
        folder: str | None = image_encoder_subfolder
        if place is None:
            folder = None
        elif "/" in str(place):
            source = Source(place, None, *options[1:])
        else:
            folder = f"{place}/{folder}" if folder else str(place)
        self._load_adapters(pretrained_model_name_or_path_or_dict, subfolder, weight_name, options, folder, source)

    def embed_pictures(self, run: Run, guided: bool) -> list[torch.Tensor]:
        args, adapters = run.args, projections_of(self.denoiser)
        assert adapters is not None  # or there would be nothing to embed
        height, width = self.task.size(run)
        black = [np.zeros((height, width, 3), dtype=np.uint8)] * len(adapters.scales)
        branches = []
        for sign in ("negative_", "")[0 if guided else 1 :]:
            given = getattr(args, f"{sign}ip_adapter_image"), getattr(args, f"{sign}ip_adapter_image_embeds")
            if given[0] is None and given[1] is None:
                given = black, None
            branches.append(self.prepare_ip_adapter_image_embeds(*given, run.device))
        if guided and any(a.shape[:2] != b.shape[:2] for a, b in zip(*branches, strict=True)):
            raise ValueError("the negative branch has another number of picture prompts: pass as many as of the positive one")
        return [torch.cat(parts) for parts in zip(*branches, strict=True)]
