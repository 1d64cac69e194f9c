"""The public pipelines with ControlNet-XS (arXiv:2312.06573), which steers a U-Net from within."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
from ..models.unets.unet_2d_condition import UNet2DConditionModel
from ..pipelines.adapters import Control, ControlNet
from ..pipelines.conditioning import Conditioning
from ..pipelines.guidance import WHOLE, Weakening
from ..pipelines.image import network_of
from ..pipelines.run import Run
from ..pipelines.tasks import ImageToImage, Inpaint, Task
from .stable_diffusion import StableDiffusion
from .stable_diffusion_pipelines import SCHEDULE, Inpainting
from .stable_diffusion_xl import StableDiffusionXL
from .stable_diffusion_xl_pipelines import PICTURES, Refining
from .unet import UNetFamily, unet_inputs


class ControlNetXS(ControlNet):
    """The slim side of a ControlNet-XS, which exchanges features with the U-Net instead of answering residuals."""

    name = "slim-controlnet"

    def adopt(self, network: Any) -> Any:
        if not isinstance(network, ControlNetXSAdapter):
            raise TypeError(f"controlnet is a {type(network).__name__}: expected a ControlNetXSAdapter")
        return network


SLIM, BESIDE = ControlNetXS("image", ""), ControlNetXS("control_image", "")


class Steered(UNetFamily):
    """A U-Net that is joined to a slim side when the pipeline is built; one that is joined already is taken as it is."""

    unet: Any

    def adopt(self) -> None:
        super().adopt()
        if not isinstance(self.unet, UNetControlNetXSModel):
            self.unet = UNetControlNetXSModel.from_unet(self.unet, self.controlnet).eval()

    @property
    def input_channels(self) -> int:
        return self.unet.config.get("in_channels", 4)  # joined ones have no other number

    def control(
        self, run: Run, control: Control, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, branches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """What the joined network reads of a control picture."""
        picture = torch.cat([control.pictures[0]] * len(branches))
        scale = torch.as_tensor(control.scale).to(picture).expand(len(x), 1, 1, 1)
        return {"controlnet_cond": picture, "conditioning_scale": scale}

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, weakening: Weakening = WHOLE) -> torch.Tensor:
        if isinstance(weakening.network, UNet2DConditionModel):  # guidance away from a U-Net alone, without a slim side
            alone = {key: value for key, value in conditioning.items() if key not in ("controlnet_cond", "conditioning_scale")}
            return super().predict(x, t, Conditioning(alone), weakening)
        inputs, acts = unet_inputs(conditioning, weakening), "controlnet_cond" in conditioning
        return network_of(self, weakening)(x, t, **inputs, apply_control=acts, return_dict=False)[0]


class StableDiffusionControlNetXSPipeline(Steered, StableDiffusion, task=Task(), adapters=(SLIM,), later=PICTURES + SCHEDULE):
    """Pictures from text, steered by a picture of edges, depth, pose ..."""


class StableDiffusionControlNetXSImg2ImgPipeline(Steered, StableDiffusion, task=ImageToImage(), adapters=(BESIDE,), later=SCHEDULE):
    """Pictures from a picture and text, steered by a control picture."""


class StableDiffusionControlNetXSInpaintPipeline(Steered, Inpainting, task=Inpaint(), adapters=(BESIDE,), later=SCHEDULE):
    """Paints a masked region anew, steered by a control picture."""


class StableDiffusionXLControlNetXSPipeline(
    Steered, StableDiffusionXL, task=Task(), adapters=(SLIM,), later=f"{PICTURES} {SCHEDULE} denoising_end",
    defaults={"guidance_scale": 5.0},
):  # fmt: skip
    """Pictures from text, steered by a picture of edges, depth, pose ..."""


class StableDiffusionXLControlNetXSImg2ImgPipeline(Steered, Refining, task=ImageToImage(), adapters=(BESIDE,)):
    """Pictures from a picture and text, steered by a control picture."""


class StableDiffusionXLControlNetXSInpaintPipeline(Steered, Refining, task=Inpaint(), adapters=(BESIDE,)):
    """Paints a masked region anew, steered by a control picture."""
