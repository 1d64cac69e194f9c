"""The catalogue of configuration keys and of arguments: each name and its meaning, written once for every scheduler.

A scheduler class lists what its constructor, ``step`` and ``set_timesteps`` take, in the reference's order; their signatures and
their documentation come from here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = inspect.Parameter.empty


class Key(NamedTuple):
    """One configuration key: its default, what it means, and what it may be (anything, if empty)."""

    default: Any
    doc: str
    choices: tuple[Any, ...] = ()


VARIANCES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
KEYS: dict[str, Key] = {
    "num_train_timesteps": Key(1000, "Steps, or levels, that the model was trained with."),
    "beta_start": Key(0.0001, "Variance of the noise that the first training step adds."),
    "beta_end": Key(0.02, "Variance of the noise that the last training step adds."),
    "beta_schedule": Key("linear", "Betas between them.", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")),
    "trained_betas": Key(None, "All betas, in place of a schedule."),
    "rescale_betas_zero_snr": Key(False, "Rescale the betas to zero terminal signal (arXiv:2305.08891)."),
    "snr_shift_scale": Key(3.0, "Divide the signal-to-noise ratio by this."),
    "prediction_type": Key("epsilon", "What the network predicts; see `sfumato.schedulers.prediction.denoised_coefficients`."),
    "predict_x0": Key(True, "Extrapolate the denoised sample, else the noise."),
    "clip_sample": Key(True, "Clip the denoised sample."),
    "clip_sample_range": Key(1.0, "Clip it to minus and plus this."),
    "clip_denoised": Key(True, "Clip the denoised sample to -1..1."),
    "thresholding": Key(False, "Threshold the denoised sample dynamically (arXiv:2205.11487, 2.3); for models in pixels."),
    "dynamic_thresholding_ratio": Key(0.995, "Quantile of its magnitudes that becomes 1."),
    "sample_max_value": Key(1.0, "Bound of the threshold."),
    "set_alpha_to_one": Key(True, "The run ends at the clean sample (backwards: begins), else at the level of training step 0."),
    "variance_type": Key(None, "Variance of the added noise; with `learned` ones the network appends as many channels.", VARIANCES),
    "timestep_spacing": Key("linspace", "Where a run stops (arXiv:2305.08891, table 2).", ("linspace", "leading", "trailing")),
    "steps_offset": Key(0, "Added to the stops of `leading`."),
    "interpolation_type": Key("linear", "Interpolate the sigmas at the stops, or even in logarithm.", ("linear", "log_linear")),
    "timestep_type": Key("discrete", "`continuous` tells v-prediction networks log(sigma) / 4.", ("discrete", "continuous")),
    "final_sigmas_type": Key("zero", "The run ends without noise, or at the smallest level.", ("zero", "sigma_min")),
    "use_karras_sigmas": Key(False, "Space the sigmas by arXiv:2206.00364 eq. 5."),
    "use_exponential_sigmas": Key(False, "Space the sigmas evenly in logarithm."),
    "use_beta_sigmas": Key(False, "Space the sigmas by quantiles of a beta distribution (arXiv:2407.12173)."),
    "use_lu_lambdas": Key(False, "Space the levels evenly in half log signal-to-noise."),
    "sigma_min": Key(None, "Smallest noise level."),
    "sigma_max": Key(None, "Largest noise level."),
    "sigma_data": Key(0.5, "Standard deviation of the data."),
    "sigma_schedule": Key("karras", "Spacing of the sigmas.", ("karras", "exponential")),
    "rho": Key(7.0, "Exponent of the `karras` spacing."),
    "lambda_min_clipped": Key(-math.inf, "Leave out levels of smaller half log signal-to-noise (cosine tables reach -inf)."),
    "use_flow_sigmas": Key(False, "The model is a flow."),
    "flow_shift": Key(1.0, "Move a flow's levels towards noise (arXiv:2403.03206 eq. 23)."),
    "shift": Key(1.0, "Move the levels towards noise (arXiv:2403.03206 eq. 23)."),
    "use_dynamic_shifting": Key(False, "Let `set_timesteps` take that shift as `mu`, its logarithm."),
    "time_shift_type": Key("exponential", "`mu` is the shift's logarithm, or the shift itself.", ("exponential", "linear")),
    "base_shift": Key(0.5, "`mu` of a picture of `base_image_seq_len` tokens, for pipelines."),
    "max_shift": Key(1.15, "`mu` of a picture of `max_image_seq_len` tokens, for pipelines."),
    "base_image_seq_len": Key(256, "See `base_shift`."),
    "max_image_seq_len": Key(4096, "See `max_shift`."),
    "invert_sigmas": Key(False, "The model counts levels from the clean end."),
    "shift_terminal": Key(None, "Level at which the last step begins; the others are stretched to it."),
    "stochastic_sampling": Key(False, "Mix the denoised sample with fresh noise at each step."),
    "scale_factors": Key(None, "Sizes of the first steps' results, relative to the first sample."),
    "upscale_mode": Key("bicubic", "How they are scaled, a mode of `torch.nn.functional.interpolate`."),
    "solver_order": Key(2, "Order of the solver, 1 to 3; guided sampling is best with 2."),
    "algorithm_type": Key("dpmsolver++", "What is extrapolated: with `++` the denoised sample, else the noise; `sde-` adds noise."),
    "solver_type": Key("midpoint", "Form of the second-order step."),
    "lower_order_final": Key(True, "Lower the order in the last steps of short runs."),
    "euler_at_final": Key(False, "Take the last step at first order."),
    "disable_corrector": Key([], "Positions of steps that are not corrected."),
    "solver_p": Key(None, "Another scheduler that predicts in place of UniP."),
    "predictor_order": Key(2, "Order of the Adams-Bashforth step.", (1, 2, 3, 4)),
    "corrector_order": Key(2, "Order of the Adams-Moulton step.", (1, 2, 3, 4)),
    "tau_func": Key(None, "Strength of the noise at a training step; by default 1 within 200..800, else 0."),
    "skip_prk_steps": Key(False, "Leave out the Runge-Kutta warm-up."),
    "noise_sampler_seed": Key(None, "Seed of the Brownian motion; without it `step` draws one from its generator."),
    "eta": Key(0.0, "How much of a step is noise, 0 (none) to 1."),
    "s_noise": Key(1.0, "Factor of the noise."),
    "s_churn": Key(80, "How much noise a run adds."),
    "s_min": Key(0.05, "Smallest level at which noise is added."),
    "s_max": Key(50, "Largest level at which noise is added."),
    "snr": Key(0.15, "Signal-to-noise ratio of a corrector step."),
    "correct_steps": Key(1, "Corrector steps per predictor step."),
    "sampling_eps": Key(1e-5, "Time at which a run ends, from 1."),
    "beta_min": Key(0.1, "Rate of noise at time 0."),
    "beta_max": Key(20, "Rate of noise at time 1."),
    "scaler": Key(1.0, "Moves the levels towards the clean end above 1, towards noise below."),
    "s": Key(0.008, "Offset of the cosine."),
    "original_inference_steps": Key(50, "Steps of the sampler that the model was distilled from; a run's are among them."),
    "timestep_scaling": Key(10.0, "Sharpness of the boundary condition, in training steps."),
    "num_vec_classes": Key(REQUIRED, "Classes of tokens, the mask (the last) included."),
    "alpha_cum_start": Key(0.99999, "Share of tokens that are kept up to the first training step; linear from there."),
    "alpha_cum_end": Key(0.000009, "Share of tokens that are kept up to the last training step."),
    "gamma_cum_start": Key(0.000009, "Share of tokens that are masked up to the first training step; linear from there."),
    "gamma_cum_end": Key(0.99999, "Share of tokens that are masked up to the last training step."),
    "mask_token_id": Key(REQUIRED, "Token of the mask."),
    "masking_schedule": Key("cosine", "Share of masked tokens over the steps.", ("cosine", "linear")),
}
GROUPS = {
    "BETAS": "num_train_timesteps beta_start beta_end beta_schedule trained_betas",
    "LIMITS": "thresholding dynamic_thresholding_ratio sample_max_value",
    "RAMPS": "use_karras_sigmas use_exponential_sigmas use_beta_sigmas",
    "FLOW": "use_flow_sigmas flow_shift",
    "SPACING": "timestep_spacing steps_offset",
    "SHIFTS": "num_train_timesteps shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len"
    " invert_sigmas shift_terminal use_karras_sigmas use_exponential_sigmas use_beta_sigmas time_shift_type",
    "MULTISTEP": "BETAS solver_order prediction_type LIMITS SOLVER",
    "SOLVER": "algorithm_type solver_type lower_order_final",
    "DYNAMIC": "use_dynamic_shifting time_shift_type",
    "ENDS": "clip_sample set_alpha_to_one steps_offset",
    "BOUNDS": "thresholding dynamic_thresholding_ratio clip_sample_range sample_max_value",
    "ADAMS": "predictor_order corrector_order",
    "STOPS": "timestep_spacing rescale_betas_zero_snr",
    "CUT": "lambda_min_clipped variance_type",
    "EDM": "sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps",
}
"""Keys that several classes take one after the other."""
DOCS = {name: key.doc + (f" One of {', '.join(map(str, key.choices))}." if key.choices else "") for name, key in KEYS.items()}
ARGUMENTS = {
    "model_output": ("Tensor", "``(B, C, ...)``, or ``(B, 2C, ...)`` with a learned variance."),
    "timestep": ("Time", "Of this step, an element of ``timesteps``; solvers on sigmas read it in a run's first step only."),
    "sample": ("Tensor", "``(B, C, ...)``."),
    "generator": ("Generators", "Source of the noise, where a solver adds any."),
    "variance_noise": ("Tensor | None", "The noise itself, in place of ``generator``; CogVideoX's solvers refuse it."),
    "eta": ("float", "Share of the noise that is fresh, 0 (none) to 1 (DDIM: as DDPM; TCD's gamma: as LCM); CogVideoX takes none."),
    "use_clipped_model_output": ("bool", "Recompute the noise from the clipped denoised sample."),
    "s_churn": ("float", "Noise that a run adds before its steps (0: none); flow models refuse it."),
    "s_tmin": ("float", "Smallest sigma at which it is added."),
    "s_tmax": ("float", "Largest sigma at which it is added."),
    "s_noise": ("float", "Factor of the noise."),
    "order": ("int", "Most levels whose slopes are used."),
    "original_image": ("Tensor", "The clean picture that is known in part; broadcasts to ``sample``."),
    "mask": ("Tensor", "1 where it is kept, 0 where it is not; broadcasts to ``sample``."),
    "prev_timestep": ("Time | None", "Training step to go down to; by default the one below."),
    "old_pred_original_sample": ("Tensor | None", "Denoised sample of the last step, ``None`` in the first."),
    "timestep_back": ("Time | None", "Timestep of the last step, ``None`` in the first."),
    "pred_original_sample": ("Tensor | None", "The denoised sample, in place of the network's prediction."),
    "per_token_timesteps": ("Tensor | None", "``(B, N)``, times of the tokens of a sample ``(B, N, C)``: each goes a level down."),
    "return_dict": ("bool", "Return an output object such as :class:`SchedulerOutput`, else the tuple of its fields."),
    "num_inference_steps": ("Count", "Number of steps; for solvers on training steps at most as many."),
    "device": ("Device", "Where ``timesteps`` will lie."),
    "timesteps": ("Values", "Times, descending; Wuerstchen's with the end, consistency models' as places, 0 the noisiest."),
    "sigmas": ("Values", "Noise levels, descending, with the end unless a flow's; EDM's as places, from 0, the noisiest, to 1."),
    "mu": ("float | None", "Logarithm of the shift of a flow's levels, with ``use_dynamic_shifting``."),
    "kwargs": ("Any", "Arguments of other schedulers, without effect."),
    "num_train_timesteps": ("Count", "Number of training steps, in place of the configuration's."),
}
"""Types and meanings of the arguments of ``step`` and ``set_timesteps``."""
METHODS = {
    "step": "Goes one step along the run (of solvers that ask the network twice a step: one evaluation further).",
    "set_timesteps": "Lays out a run of so many steps, or of given times or levels: exactly one, unless a class says otherwise.",
}
"""What these methods do."""
ERRORS = {
    "step": "``set_timesteps`` was not called, the timestep is not in the schedule, or the run is at its end.",
    "set_timesteps": "None or several of the sources were given, or one does not fit the configuration.",
}
"""When they raise a ValueError."""


def signature(names: str, defaults: Mapping[str, Any]) -> inspect.Signature:
    """Builds a constructor's signature from names of keys and groups, and the defaults that differ from the catalogue's."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    while names != (names := " ".join(GROUPS.get(word, word) for word in names.split())):
        pass  # groups are made of groups, too
    keys = [inspect.Parameter(word, kind, default=defaults.get(word, KEYS[word].default)) for word in names.split()]
    return inspect.Signature([inspect.Parameter("self", kind), *keys])


def document(taken: inspect.Signature, docs: Mapping[str, str]) -> str:
    """Writes the ``Args`` section of a method's documentation."""
    defaults = {p.name: "" if p.default is REQUIRED else f" Default: {p.default!r}." for p in taken.parameters.values()}
    return "Args:\n" + "\n".join(f"    {name}: {docs[name]}{default}" for name, default in defaults.items() if name != "self")


def method(name: str, takes: str) -> Callable[..., Any]:
    """Defines ``step`` or ``set_timesteps``, which ``takes`` parameters as a ``def`` has them and hands them on.

    The output, the timestep and the sample, which begin every ``step``, and ``return_dict``, which ends it, go without saying.
    It is compiled, as a data class's constructor is: Python itself checks the arguments, and a call costs what any other does.
    """
    if name == "step" and "sample" not in takes.split(", "):
        last = "" if "return_dict" in takes else "return_dict=True"
        takes = ", ".join(filter(None, ["model_output, timestep, sample", takes, last]))
    names = [parameter.partition("=")[0] for parameter in takes.split(", ") if parameter[0] != "*"]
    call = f"_lay_out({', '.join(f'{word}={word}' for word in names)})"
    if name == "step":
        common = ["model_output", "timestep", "sample", "return_dict"]
        call = f"_advance({', '.join(common + [word for word in names if word not in common])})"
    scope: dict[str, Any] = {"inf": math.inf, "__name__": __name__}
    exec(f"def {name}(self, {takes}):\n    return self.{call}", scope)
    made = scope[name]
    arguments = document(inspect.signature(made), {k: doc for k, (_, doc) in ARGUMENTS.items()})
    made.__doc__ = f"{METHODS[name]}\n\n{arguments}\n\nRaises:\n    ValueError: {ERRORS[name]}"
    made.__annotations__ = {word: ARGUMENTS[word][0] for word in made.__code__.co_varnames[1:]}
    return made
