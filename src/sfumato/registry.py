"""Tables: public name -> module. The one place where a public class is announced."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import did_you_mean

_MODULES: dict[str, str] = {
    "config": "ConfigMixin FrozenConfig",
    "errors": "SfumatoError ConfigError WeightsError HubError",
    "outputs": "BaseOutput ImagePipelineOutput StableDiffusionPipelineOutput FluxPriorReduxPipelineOutput",
    "models.base": "ModelMixin",
    "models.unets.unet_2d": "UNet2DModel",
    "models.unets.unet_2d_condition": "UNet2DConditionModel",
    "models.controlnets.controlnet": "ControlNetModel MultiControlNetModel",
    "models.controlnets.controlnet_union": "ControlNetUnionModel MultiControlNetUnionModel",
    "models.controlnets.controlnet_xs": "ControlNetXSAdapter UNetControlNetXSModel",
    "models.adapters.t2i_adapter": "T2IAdapter MultiAdapter",
    "models.autoencoders.autoencoder_kl": "AutoencoderKL",
    "models.autoencoders.autoencoder_tiny": "AutoencoderTiny",
    "models.autoencoders.autoencoder_asym_kl": "AsymmetricAutoencoderKL",
    "models.autoencoders.vq_model": "VQModel",
    "models.autoencoders.outputs": "AutoencoderKLOutput AutoencoderTinyOutput VQEncoderOutput DecoderOutput",
    "models.autoencoders.distribution": "DiagonalGaussianDistribution",
    "models.text_encoders.clip": "CLIPTextModel CLIPTextModelWithProjection",
    "models.safety_checker": "StableDiffusionSafetyChecker",
    "models.transformers.outputs": "Transformer2DModelOutput",
    "models.transformers.sd3": "SD3Transformer2DModel",
    "models.transformers.flux": "FluxTransformer2DModel",
    "models.controlnets.sd3": "SD3ControlNetModel SD3MultiControlNetModel SD3ControlNetOutput",
    "models.controlnets.flux": "FluxControlNetModel FluxMultiControlNetModel FluxControlNetOutput",
    "models.redux": "ReduxImageEncoder ReduxImageEncoderOutput",
    "schedulers.base": "Scheduler SchedulerMixin SchedulerOutput KarrasDiffusionSchedulers",
    "schedulers.discrete": "DDPMScheduler DDIMScheduler PNDMScheduler DDPMParallelScheduler DDIMParallelScheduler"
    " DDIMInverseScheduler RePaintScheduler UnCLIPScheduler DDPMWuerstchenScheduler CogVideoXDDIMScheduler CogVideoXDPMScheduler"
    " IPNDMScheduler",
    "schedulers.euler": "EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler"
    " KDPM2AncestralDiscreteScheduler LMSDiscreteScheduler DPMSolverSDEScheduler EDMEulerScheduler FlowMatchEulerDiscreteScheduler"
    " FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler LTXEulerAncestralRFScheduler",
    "schedulers.dpm": "DPMSolverMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverSinglestepScheduler"
    " DEISMultistepScheduler UniPCMultistepScheduler SASolverScheduler"
    " EDMDPMSolverMultistepScheduler CosineDPMSolverMultistepScheduler",
    "schedulers.consistency": "LCMScheduler TCDScheduler CMStochasticIterativeScheduler ConsistencyDecoderScheduler SCMScheduler"
    " LCMSchedulerOutput TCDSchedulerOutput",
    "schedulers.score_sde": "KarrasVeScheduler ScoreSdeVeScheduler ScoreSdeVpScheduler KarrasVeOutput SdeVeOutput",
    "schedulers.tokens": "VQDiffusionScheduler AmusedScheduler",
    "media.processor": "VaeImageProcessor IPAdapterMaskProcessor",
    "media.image": "outpaint",
    "pipelines.base": "DiffusionPipeline",
    "pipelines.upscale": "upscale_by_tiles",
    "pipelines.auto": "AutoPipelineForText2Image AutoPipelineForImage2Image AutoPipelineForInpainting",
    "pipelines.guidance": "Guidance NoGuidance ClassifierFreeGuidance EditGuidance",
    "pipelines.guiders": "ClassifierFreeZeroStarGuidance AdaptiveProjectedGuidance TangentialClassifierFreeGuidance AutoGuidance"
    " FrequencyDecoupledGuidance APG TCFG FDG",
    "pipelines.weak_models": "PerturbedAttentionGuidance SkipLayerGuidance SmoothedEnergyGuidance PAG SLG SEG",
    "pipelines.run": "Run Request Progress RunCancelled evaluate",
    "families.stable_diffusion_pipelines": "StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline"
    " StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline"
    " StableDiffusionAdapterPipeline StableDiffusionAdapterImg2ImgPipeline StableDiffusionAdapterInpaintPipeline",
    "families.stable_diffusion_variants": "StableDiffusionDepth2ImgPipeline StableDiffusionUpscalePipeline"
    " StableDiffusionControlNetDepth2ImgPipeline StableDiffusionAdapterDepth2ImgPipeline"
    " StableDiffusionControlNetInstructPix2PixPipeline StableDiffusionAdapterInstructPix2PixPipeline"
    " StableDiffusionInstructPix2PixPipeline StableDiffusionImageVariationPipeline",
    "families.stable_diffusion_xl_pipelines": "StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline"
    " StableDiffusionXLInpaintPipeline StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetImg2ImgPipeline"
    " StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetUnionPipeline StableDiffusionXLAdapterPipeline"
    " StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline"
    " StableDiffusionXLAdapterImg2ImgPipeline StableDiffusionXLAdapterInpaintPipeline StableDiffusionXLInstructPix2PixPipeline"
    " StableDiffusionXLControlNetInstructPix2PixPipeline StableDiffusionXLAdapterInstructPix2PixPipeline",
    "families.stable_diffusion_3_pipelines": "StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline"
    " StableDiffusion3InpaintPipeline StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetImg2ImgPipeline"
    " StableDiffusion3ControlNetInpaintPipeline StableDiffusion3ControlNetInpaintingPipeline",
    "families.flux_pipelines": "FluxPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxControlNetPipeline FluxFillPipeline"
    " FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlPipeline FluxControlImg2ImgPipeline"
    " FluxControlInpaintPipeline FluxKontextPipeline FluxKontextInpaintPipeline FluxControlNetFillPipeline"
    " FluxControlNetKontextPipeline",
    "families.pag_pipelines": "StableDiffusionPAGPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline"
    " StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPAGInpaintPipeline StableDiffusionXLPAGPipeline"
    " StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline StableDiffusionXLControlNetPAGPipeline"
    " StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusion3PAGPipeline StableDiffusion3PAGImg2ImgPipeline",
    "families.controlnet_xs_pipelines": "StableDiffusionControlNetXSPipeline StableDiffusionControlNetXSImg2ImgPipeline"
    " StableDiffusionControlNetXSInpaintPipeline StableDiffusionXLControlNetXSPipeline"
    " StableDiffusionXLControlNetXSImg2ImgPipeline StableDiffusionXLControlNetXSInpaintPipeline",
    "families.latent_consistency": "LatentConsistencyModelPipeline LatentConsistencyModelImg2ImgPipeline",
    "families.flux_redux": "FluxPriorReduxPipeline",
    "families.latent_upscaler": "StableDiffusionLatentUpscalePipeline",
    "families.unconditional": "DDPMPipeline DDIMPipeline LDMSuperResolutionPipeline",
}

PUBLIC: dict[str, str] = {name: module for module, names in _MODULES.items() for name in names.split()}

FORMAT_LIBRARY: dict[str, str] = {
    "StableDiffusionSafetyChecker": "stable_diffusion",
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers"),
}
"""Classes that the checkpoint format files under another name than "diffusers"."""


def load(name: str) -> Any:
    """Imports a public name.

    Raises:
        AttributeError: There is no such name; the message says what is near.
    """
    if name not in PUBLIC:
        raise AttributeError(f"sfumato has no {name!r}{did_you_mean(name, PUBLIC)}")
    return getattr(importlib.import_module(f"sfumato.{PUBLIC[name]}"), name)


def pipelines(module: str | None = None) -> list[Any]:
    """Imports and returns the public pipeline classes, of one module (full name) or of all."""
    names = [n for n, m in PUBLIC.items() if m.startswith("families.") and module in (None, f"sfumato.{m}")]
    return [load(name) for name in names]
