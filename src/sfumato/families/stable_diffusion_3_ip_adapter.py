"""IP-Adapters of Stable Diffusion 3: pictures as prompts, of which each step makes tokens anew (InstantX's checkpoints).

Quirks, kept because they change the result of valid calls: the scale is 0.5 until it is set; a call without a picture is one
without the IP-Adapter; the negative branch sees zeros in place of patches.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hub import PathLike
from ..models.layers.options import AttentionOptions
from ..pipelines.ip_adapter import projections_of
from ..pipelines.run import Run
from .flow import FlowFamily


class SD3PicturePrompts(FlowFamily):
    """What differs from other IP-Adapters: SigLIP's patches, a projection that is told the time, and the quirks."""

    adapter_weights = (
        "norm_ip.linear.weight", "norm_ip.linear.bias", "to_k_ip.weight", "to_v_ip.weight", "norm_q.weight", "norm_k.weight",
        "norm_ip_k.weight",
    )  # fmt: skip
    adapter_scale = 0.5
    needs_pictures = False
    vision_model = "SiglipVisionModel"

    def load_ip_adapter(  # type: ignore[override]
        self, pretrained_model_name_or_path_or_dict: Any, weight_name: Any = "ip-adapter.safetensors", subfolder: Any = None,
        image_encoder_folder: str | None = "image_encoder", *, revision: str | None = None, token: str | bool | None = None,
        cache_dir: PathLike | None = None, local_files_only: bool = False, force_download: bool = False,
    ) -> None:  # fmt: skip
        """Loads one IP-Adapter, or several from lists: arguments and errors are those of U-Nets, in the order of this class."""
        options = (revision, token, cache_dir, local_files_only, force_download)
        self._load_adapters(pretrained_model_name_or_path_or_dict, subfolder, weight_name, options, image_encoder_folder)

    def picture_processor(self, size: int) -> Any:
        from transformers import SiglipImageProcessor

        return SiglipImageProcessor(size={"height": size, "width": size})

    def encode_image(self, image: Any, device: torch.device | None = None) -> torch.Tensor:  # type: ignore[override]
        """Encodes pictures by the image encoder: their patches (B, N, D)."""
        return self.encode_pictures(image, device, patches=True)[0]

    def encode_pictures(self, image: Any, device: torch.device | None, patches: bool) -> list[torch.Tensor]:
        positive, _ = super().encode_pictures(image, device, patches)
        return [positive, torch.zeros_like(positive)]

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image: Any = None, ip_adapter_image_embeds: Any = None, device: torch.device | None = None,
        num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True,
    ) -> Any:  # fmt: skip
        """Encodes picture prompts, so that later calls can take them as ``ip_adapter_image_embeds``.

        Returns:
            One picture of one IP-Adapter as a tensor (num_images_per_prompt, N, D), under guidance with as many rows more in front,
            of the negative branch. Otherwise a list with a tensor (rows, pictures, N, D) for each IP-Adapter.
        """
        given = _listed(ip_adapter_image_embeds)
        options = device, num_images_per_prompt, do_classifier_free_guidance
        found = super().prepare_ip_adapter_image_embeds(ip_adapter_image, given, *options)
        return found[0].squeeze(1) if len(found) == 1 and found[0].shape[1] == 1 else found

    def embed_pictures(self, run: Run, guided: bool) -> list[torch.Tensor]:
        return _listed(super().embed_pictures(run, guided))

    def told_time(self, options: AttentionOptions | None, timestep: torch.Tensor) -> AttentionOptions | None:
        """Options of a call at times (B,): with tokens of its picture prompts in place of their patches."""
        adapters = projections_of(self.denoiser)
        if options is None or not options.image_tokens or adapters is None:
            return options
        return adapters.at_time(options, timestep)


def _listed(embeds: Any) -> Any:
    """Patches (rows, N, D), or a list of them or of (rows, pictures, N, D), as a list of the latter; others as they are."""
    each = [embeds] if isinstance(embeds, torch.Tensor) else embeds
    if not isinstance(each, (list, tuple)):
        return each
    return [x.unsqueeze(1) if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in each]
