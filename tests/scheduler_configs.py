"""Configurations at which schedulers are compared with the reference."""

from __future__ import annotations

import itertools
from typing import Any

import torch

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
NAMES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
FEW_KEYS = ("FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler", "IPNDMScheduler")
EXACT = ("DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "SASolverScheduler")
"""Where the reference's float32 tables lose more than the tolerance: they, and the samples, are made float64 there."""
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ("linspace", "leading", "trailing")


def grid(*axes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def axis(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


COMMON = grid([LATENT, {}, {"beta_schedule": "squaredcos_cap_v2"}], axis("timestep_spacing", *SPACINGS))
OFFSET = grid([LATENT], axis("timestep_spacing", "leading", "trailing"), axis("steps_offset", 1))
SNR = [
    {**LATENT, "rescale_betas_zero_snr": True, "timestep_spacing": s, "prediction_type": p}
    for s, p in (("trailing", "v_prediction"), ("linspace", "v_prediction"), ("leading", "epsilon"))
]
TRAINED = [{"trained_betas": torch.linspace(0.001, 0.03, 500).tolist(), "num_train_timesteps": 500}]
BOUNDED = grid(
    [LATENT],
    axis("prediction_type", "epsilon", "sample", "v_prediction"),
    [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "clip_sample": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.9},
    ],
)
RAMPS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SOLVERS = [
    {**LATENT, "algorithm_type": a, "final_sigmas_type": f, "solver_order": o, "solver_type": t}
    for a in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    for f in (("zero", "sigma_min") if a.endswith("++") else ("sigma_min",))
    for o in ((1, 2) if a == "sde-dpmsolver" else (1, 2, 3, 4))
    for t in ("midpoint", "heun")
]
FINALS = axis("final_sigmas_type", "zero", "sigma_min")
KINDS = axis("prediction_type", "epsilon", "sample", "v_prediction")
PRK = axis("skip_prk_steps", True, False)
CONTINUOUS = {**LATENT, "timestep_type": "continuous", "prediction_type": "v_prediction"}
CLIPS = [{"clip_sample": True, "clip_sample_range": r} for r in (0.7, 1.5)]
FLOWS = [{"use_flow_sigmas": True, "flow_shift": s, "prediction_type": "flow_prediction"} for s in (1.0, 3.0)]
SPACED = grid([LATENT], axis("timestep_spacing", *SPACINGS), axis("steps_offset", 0, 1))
BETAS = [{}, {"beta_schedule": "squaredcos_cap_v2"}]
VE = SPACED + BETAS + TRAINED + grid([LATENT], RAMPS, axis("prediction_type", "epsilon", "v_prediction"))
VE += grid([LATENT], RAMPS[1:], axis("timestep_spacing", "leading", "trailing"))
SINGLE = [
    {**LATENT, "algorithm_type": a, "final_sigmas_type": "sigma_min", "solver_order": o, "solver_type": t, "lower_order_final": f}
    for a in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver") for o in (1, 2, 3) for t in ("midpoint", "heun") for f in (True, False)
]  # fmt: skip


def half(t: float) -> float:
    return 0.5


def never(t: float) -> float:
    return 0.0


COSINE = [{"beta_schedule": "squaredcos_cap_v2"}]
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": COMMON + OFFSET + SNR + TRAINED + BOUNDED + [{"beta_schedule": "sigmoid"}]
    + grid([LATENT], axis("variance_type", "fixed_small_log", "fixed_large", None)),
    "DDIMScheduler": COMMON + OFFSET + SNR + TRAINED + BOUNDED
    + grid([LATENT], axis("set_alpha_to_one", False), axis("steps_offset", 0, 1)),
    "PNDMScheduler": grid(COMMON, PRK) + OFFSET
    + grid([LATENT], axis("prediction_type", "v_prediction"), PRK, axis("set_alpha_to_one", True, False)),
    "EulerDiscreteScheduler": COMMON + OFFSET + SNR + TRAINED
    + grid([LATENT], RAMPS, axis("interpolation_type", "linear", "log_linear"), KINDS)
    + grid([CONTINUOUS], RAMPS, axis("prediction_type", "v_prediction", "epsilon"))
    + [{**LATENT, "prediction_type": "original_sample"}]
    + [{**CONTINUOUS, "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}]
    + grid([LATENT], RAMPS, [{"sigma_min": 0.05, "sigma_max": 10.0}], FINALS, axis("timestep_spacing", *SPACINGS)),
    # On the cosine table the reference's float32 gives NaN for 4 steps with linspace.
    "EulerAncestralDiscreteScheduler": SNR + TRAINED
    + grid(COMMON[:6] + OFFSET, axis("prediction_type", "epsilon", "v_prediction")),
    "DPMSolverMultistepScheduler": COMMON + OFFSET + SNR + TRAINED + SOLVERS + grid(COSINE, RAMPS)
    + grid([LATENT], [*RAMPS, {"use_lu_lambdas": True}], FINALS, axis("lower_order_final", True, False),
           axis("euler_at_final", True, False))
    + grid([LATENT], KINDS, axis("thresholding", True, False),
           [{}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}])
    + grid(axis("use_flow_sigmas", True), axis("flow_shift", 1.0, 3.0), axis("prediction_type", "flow_prediction", "epsilon"),
           axis("solver_order", 2, 3))
    + grid([LATENT], axis("lambda_min_clipped", -1.1, -5.1), axis("timestep_spacing", *SPACINGS)),
    "DPMSolverSinglestepScheduler": SINGLE + grid([{**LATENT, "solver_order": 3}], RAMPS, FINALS)
    + grid([LATENT], KINDS, axis("thresholding", True, False)) + grid(FLOWS, axis("solver_order", 2, 3))
    + grid([LATENT], axis("lambda_min_clipped", -1.1, -5.1), axis("solver_order", 1, 2, 3)) + TRAINED + [{}],
    # With exponential sigmas the reference loses its place among 25 timesteps, of which the first two are equal.
    "DPMSolverMultistepInverseScheduler": SPACED + BETAS + TRAINED + grid([LATENT], [RAMPS[0], RAMPS[1], RAMPS[3]], KINDS)
    + [{**LATENT, "algorithm_type": a, "solver_order": o} for a in ("dpmsolver", "dpmsolver++") for o in (1, 2, 3)]
    + grid([LATENT], axis("solver_type", "heun"), axis("euler_at_final", True, False), axis("lower_order_final", True, False))
    + grid([LATENT], axis("lambda_min_clipped", -1.1), axis("timestep_spacing", *SPACINGS)),
    "HeunDiscreteScheduler": SPACED + BETAS + TRAINED + grid([LATENT], RAMPS, KINDS) + grid([LATENT], KINDS, CLIPS),
    "KDPM2DiscreteScheduler": VE,
    # On the linear and cosine tables the reference's float32 gives NaN for the level to go down to.
    "KDPM2AncestralDiscreteScheduler": [c for c in VE if c.get("beta_schedule") == "scaled_linear" and "trained_betas" not in c]
    + grid([LATENT], RAMPS[1:], axis("timestep_spacing", "leading", "trailing")),
    "DPMSolverSDEScheduler": [{**c, "noise_sampler_seed": i % 3} for i, c in enumerate(VE)],
    "LMSDiscreteScheduler": VE + grid([LATENT], axis("prediction_type", "sample"), RAMPS),
    "DEISMultistepScheduler": SPACED + BETAS + TRAINED + grid([LATENT], RAMPS, axis("solver_order", 1, 2, 3))
    + grid([LATENT], KINDS, axis("thresholding", True, False)) + grid(FLOWS, axis("solver_order", 2, 3))
    + grid([LATENT], axis("lower_order_final", False), axis("solver_order", 2, 3)) + [{**LATENT, "solver_type": "heun"}],
    "UniPCMultistepScheduler": SPACED + BETAS + TRAINED + SNR + grid([LATENT], RAMPS, FINALS)
    + grid([LATENT], axis("solver_order", 1, 2, 3, 4), axis("solver_type", "bh1", "bh2"), axis("final_sigmas_type", "sigma_min"))
    + grid([LATENT], KINDS, axis("thresholding", True, False)) + grid(FLOWS, axis("solver_order", 2, 3))
    + [{**LATENT, "predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": o} for o in (1, 2, 3)]
    + [{**LATENT, "disable_corrector": [0, 1, 3]}, {**LATENT, "solver_type": "midpoint"}]
    + [{**LATENT, r: True, "sigma_min": 0.05, "sigma_max": 10.0} for r in ("use_karras_sigmas", "use_exponential_sigmas")]
    + grid(FLOWS[1:], [{"shift_terminal": 0.1}, {"final_sigmas_type": "sigma_min"}, {"use_karras_sigmas": True}]),
    "SASolverScheduler": SPACED + BETAS + TRAINED + grid([LATENT], RAMPS) + FLOWS
    + grid([LATENT], KINDS, [{}, {"thresholding": True}, {"algorithm_type": "noise_prediction"}])  # its both fail in the reference
    + grid([LATENT], axis("predictor_order", 1, 2, 3, 4), axis("corrector_order", 1, 2, 4), axis("tau_func", None, half, never))
    + grid([LATENT], axis("algorithm_type", "noise_prediction"), axis("predictor_order", 3), axis("corrector_order", 1, 3),
           axis("tau_func", half))
    + [{**LATENT, "lower_order_final": False}, {**LATENT, "lambda_min_clipped": -1.1}],
}  # fmt: skip
RANGE = {"rho": 5.0, "sigma_max": 50.0, "sigma_min": 0.01, "sigma_data": 1.0}
EDM = grid([{}, RANGE], axis("sigma_schedule", "karras", "exponential"), FINALS,
           axis("prediction_type", "epsilon", "v_prediction"))  # fmt: skip
ORDERS = grid(axis("solver_order", 1, 2), axis("solver_type", "midpoint", "heun"), axis("euler_at_final", True, False),
              axis("lower_order_final", True, False))  # fmt: skip
SHIFTS = [
    {},
    {"shift": 3.0},
    {"shift_terminal": 0.1, "shift": 2.0},
    {"invert_sigmas": True},
    {"num_train_timesteps": 500, "shift": 2.0},
]
FLOW_MATCH = grid(SHIFTS, RAMPS)
OTHERS: dict[str, list[dict[str, Any]]] = {
    "EDMEulerScheduler": [*EDM, *grid(axis("num_train_timesteps", 500), axis("rho", 3.0, 9.0), FINALS)],
    "EDMDPMSolverMultistepScheduler": EDM + ORDERS + [{"solver_order": 3, "solver_type": t} for t in ("midpoint", "heun")]
    + [{"thresholding": True}] + grid(axis("algorithm_type", "sde-dpmsolver++"), ORDERS),
    "CosineDPMSolverMultistepScheduler": [{k: v for k, v in c.items() if v != "sigma_min"} for c in EDM] + ORDERS,
    "FlowMatchEulerDiscreteScheduler": FLOW_MATCH + [{"stochastic_sampling": True, "shift": s} for s in (1.0, 3.0)],
    "FlowMatchLCMScheduler": FLOW_MATCH,
    # All the keys that they have.
    "FlowMatchHeunDiscreteScheduler": grid(axis("shift", 1.0, 2.0, 5.0), axis("num_train_timesteps", 500, 1000)),
    "LTXEulerAncestralRFScheduler": grid(axis("eta", 0.0, 0.5, 1.0), axis("s_noise", 0.0, 0.9, 1.0)),
    "IPNDMScheduler": [{}, {"num_train_timesteps": 500}],
}  # fmt: skip
