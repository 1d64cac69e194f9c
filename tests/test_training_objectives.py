"""What a denoiser learns, against the reference and against mathematics; the settings and the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import sfumato
from sfumato.cli import train as train_command
from sfumato.cli.main import app
from sfumato.errors import ConfigError
from sfumato.training.objectives import Levels, Objective, draw_noise, draw_places
from sfumato.training.settings import AutoencoderSettings, Settings, TextToImageSettings

TABLE: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def objective(**changes: Any) -> Objective:
    return Objective.of(sfumato.DDIMScheduler(**{**TABLE, **changes}))


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 3, 3, generator=draw), torch.randn(6, 4, 3, 3, generator=draw)


PLACES = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 0.9999])


@pytest.mark.parametrize(("kind", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_tables_are_the_references(kind: str, zero: bool) -> None:
    reference = diffusers.DDPMScheduler(**TABLE, rescale_betas_zero_snr=zero)
    x0, noise = samples()
    made = objective(prediction_type=kind, rescale_betas_zero_snr=zero)
    levels = made.levels(PLACES)
    assert levels.time.tolist() == [0, 100, 250, 500, 900, 999]
    torch.testing.assert_close(made.noisy(x0, noise, levels), reference.add_noise(x0, noise, levels.time), atol=1e-5, rtol=1e-5)
    expected = noise if kind == "epsilon" else reference.get_velocity(x0, noise, levels.time)
    torch.testing.assert_close(made.target(x0, noise, levels), expected, atol=1e-5, rtol=1e-5)


def test_zero_terminal_table_ends_in_noise() -> None:
    x0, noise = samples()
    made = objective(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    levels = made.levels(torch.full((6,), 0.9999))
    assert torch.equal(made.noisy(x0, noise, levels), noise)
    torch.testing.assert_close(made.target(x0, noise, levels), -x0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_references(shift: float) -> None:
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, noise = samples()
    made = Objective.of(sfumato.FlowMatchEulerDiscreteScheduler(shift=shift))
    # the reference's table holds the shifted sigmas of 1/1000, 2/1000, ..., 1, descending
    index = torch.tensor([0, 100, 500, 750, 900, 999])
    levels = made.levels((1000 - index) / 1000)
    torch.testing.assert_close(levels.sigma, reference.sigmas[index])
    torch.testing.assert_close(levels.time, reference.timesteps[index], rtol=1e-5, atol=1e-3)
    expected = reference.scale_noise(x0, reference.timesteps[index], noise)
    torch.testing.assert_close(made.noisy(x0, noise, levels), expected, atol=1e-5, rtol=1e-5)
    # the target is the derivative of the path by sigma
    later = Levels(levels.alpha - 1e-3, levels.sigma + 1e-3, levels.time)
    slope = (made.noisy(x0, noise, later) - made.noisy(x0, noise, levels)) / 1e-3
    torch.testing.assert_close(made.target(x0, noise, levels), slope, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_min_snr_caps_the_weight_of_the_clean_samples_error(kind: str) -> None:
    """Whatever is predicted, the weighted error is ``min(snr, gamma)`` times that of x0 (arXiv:2303.09556)."""
    made = Objective(kind, objective().alphas_cumprod)
    x0, noise = samples()
    levels = made.levels(PLACES.clamp(0.001, 0.999))
    alpha, sigma = (v.view(-1, 1, 1, 1).double() for v in levels[:2])
    wrong = x0 + 0.1
    noisy = made.noisy(x0.double(), noise.double(), levels)
    implied = (noisy - alpha * wrong) / sigma  # the noise that this x0 implies
    error = made.target(wrong.double(), implied, levels) - made.target(x0.double(), noise.double(), levels)
    snr = (levels.alpha.double() / levels.sigma.double()) ** 2
    got = made.weight(levels, 5.0).double() * error.square().flatten(1).mean(1)
    torch.testing.assert_close(got, snr.clamp(max=5.0) * 0.1**2, rtol=1e-3, atol=1e-9)


def test_places() -> None:
    draw = torch.Generator().manual_seed(0)
    uniform = draw_places(20000, "uniform", 0, 1, draw)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01) and uniform.var() == pytest.approx(1 / 12, abs=0.005)
    normal = torch.logit(draw_places(20000, "logit-normal", 0.5, 2.0, draw).double())
    assert normal.mean() == pytest.approx(0.5, abs=0.05) and normal.std() == pytest.approx(2, abs=0.05)


def test_noise_offset_is_shared_by_a_channel() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = draw_noise(torch.Size((200, 4, 16, 16)), 0.5, draw)
    assert noise.mean(dim=(2, 3)).var() == pytest.approx(0.5**2 + 1 / 256, rel=0.1)
    assert noise.var(dim=(2, 3)).mean() == pytest.approx(1, rel=0.02)
    plain = draw_noise(torch.Size((200, 4, 16, 16)), 0.0, draw)
    assert plain.mean(dim=(2, 3)).var() == pytest.approx(1 / 256, rel=0.1)


def test_the_objective_is_the_schedulers() -> None:
    flow = sfumato.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made = Objective.of(flow)
    assert made.kind == "flow_prediction" and made.shift == 3.0
    assert math.isclose(made.levels(torch.tensor([0.5])).sigma.item(), 3 * 0.5 / (1 + 2 * 0.5))


# --- settings

BASE: dict[str, Any] = dict(data="d", out="o")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Settings, dict(data="d"), "out is not given: name it in the configuration or as --out"),
        (Settings, dict(out="o"), "data is not given"),
        (Settings, {**BASE, "step": 3}, "the call has the unknown key 'step'; did you mean 'steps'"),
        (TextToImageSettings, {**BASE, "captoin_dropout": 0.1}, "unknown key 'captoin_dropout'; did you mean 'caption_dropout'"),
        (Settings, {**BASE, "steps": 0}, "steps=0 must be at least 1"),
        (Settings, {**BASE, "steps": 2.5}, "steps=2.5 is a float, expected a whole number"),
        (Settings, {**BASE, "steps": True}, "steps=True is a bool, expected a whole number"),
        (Settings, {**BASE, "ema": 1.5}, "ema=1.5 must be within 0..1"),
        (Settings, {**BASE, "learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
        (Settings, {**BASE, "precision": "bf61"}, "precision='bf61' is unknown; did you mean 'bf16'"),
        (Settings, {**BASE, "data": 3}, "data=3 is a int, expected text"),
        (TextToImageSettings, {**BASE, "validation_prompts": ["a", 3]}, "expected a list of texts"),
        (TextToImageSettings, {**BASE, "unet": 3}, "unet=3 is a int, expected text or a table"),
        (AutoencoderSettings, {**BASE, "unet": "x"}, "unknown key 'unet'"),
    ],
)
def test_wrong_settings_are_explained(kind: type[Settings], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.read(None, **values)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('data = "d"\nout = "o"\nsteps = 5\nlearning_rate = 1\n[unet]\nsample_size = 8\n')
    read = TextToImageSettings.read(path, steps=7)
    assert (read.data, read.steps, read.learning_rate, read.unet) == ("d", 7, 1, {"sample_size": 8})
    path.write_text("data = ")
    with pytest.raises(ConfigError, match=r"c.toml is missing or not valid TOML"):
        TextToImageSettings.read(path)


# --- command


def run(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *map(str, arguments)])


@pytest.mark.parametrize(
    ("command", "examples", "kind"),
    [
        ("text-to-image", train_command.TEXT_EXAMPLES, TextToImageSettings),
        ("autoencoder", train_command.AUTOENCODER_EXAMPLES, AutoencoderSettings),
    ],
)
def test_help_teaches(command: str, examples: str, kind: type[Settings]) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0 and "Examples" in done.stdout
    for line in examples.splitlines():
        if line.startswith("sfumato train "):
            assert line.split()[2] == command
            flags = [word[2:].replace("-", "_") for word in line.split() if word.startswith("--")]
            assert set(flags) <= set(kind.__dataclass_fields__)
    for name in kind.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_the_command_trains(checkpoint: Any, tmp_path: Path) -> None:
    import tiny

    model, _ = checkpoint("StableDiffusionPipeline")
    (tmp_path / "data").mkdir()
    tiny.picture().save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("red cat")
    config = tmp_path / "c.toml"
    config.write_text(
        f'model = "{model}"\ndata = "{tmp_path / "data"}"\nresolution = 32\nsteps = 9\n[scheduler]\nbeta_end = 0.02\n'
    )
    done = run("text-to-image", config, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "run" / "model")
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    assert pipe.scheduler.config.beta_end == 0.02
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["text-to-image", "--data", "d"], 1, "error: out is not given"),
        (["text-to-image", "--data", "/no/such", "--out", "o", "--steps", "0"], 1, "error: steps=0 must be at least 1"),
        (["text-to-image", "/no/such.toml"], 1, "error: /no/such.toml is missing or not valid TOML"),
        (["text-to-image", "--stepz", "3"], 2, "No such option"),
        (["autoencoder", "--data", "d", "--out", "o"], 1, "error: vae is not given"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert code == 2 or len(done.stderr.strip().splitlines()) == 1
