"""Schedulers of tokens against the reference and against Bayes' rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scheduler_configs import axis, grid
from test_schedulers import case_id, close, generator
from test_schedulers_steps import pair

import sfumato.schedulers as ours
from sfumato.random import categorical

VQ_CONFIGS = grid(
    axis("num_vec_classes", 9, 33),
    axis("num_train_timesteps", 100, 30),
    [{}, {"alpha_cum_start": 0.9, "alpha_cum_end": 0.000001}, {"gamma_cum_end": 0.9}, {"alpha_cum_start": 0.99}],
    axis("gamma_cum_start", 0.000009, 0.000001),
)


def token_probabilities(classes: int, seed: int) -> torch.Tensor:
    return torch.log_softmax(torch.randn(2, classes - 1, 50, generator=generator(seed)) * 3, 1)


@pytest.mark.parametrize("config", VQ_CONFIGS, ids=case_id)
def test_vq_diffusion(config: dict[str, Any]) -> None:
    for steps in (4, 10, 25):
        results = []
        for s in pair("VQDiffusionScheduler", config):
            s.set_timesteps(steps)
            source, tokens = generator(4), torch.full((2, 50), config["num_vec_classes"] - 1)
            samples = [s.timesteps]
            for t in s.timesteps:
                tokens = s.step(token_probabilities(config["num_vec_classes"], int(t)), t, tokens, generator=source).prev_sample
                samples.append(tokens)
            results.append([*samples, source.get_state()])
        for expected, got in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("t", [1, 3, 50, 99])
def test_vq_posterior(t: int) -> None:
    """It sums to one, is the reference's, and is Bayes' rule on the transition matrices (arXiv:2111.14822 eqs. 7 and 8)."""
    reference, scheduler = pair("VQDiffusionScheduler", {"num_vec_classes": 9})
    log_p, tokens = token_probabilities(9, 5), torch.randint(0, 9, (2, 50), generator=generator(2))
    got, expected = scheduler.q_posterior(log_p, tokens, t), reference.q_posterior(log_p, tokens, torch.tensor(t))
    possible = got.isfinite()
    close(got[possible], expected[possible])
    assert (expected[~possible] < -40).all()  # the reference says e-20 for what is impossible
    torch.testing.assert_close(got.exp().sum(1), torch.ones(2, 50))

    kept, masked = np.linspace(0.99999, 0.000009, 100), np.linspace(0.000009, 0.99999, 100)

    def transition(alpha: float, gamma: float) -> np.ndarray:  # [to, from]
        matrix = np.full((9, 9), (1 - alpha - gamma) / 8) + np.eye(9) * alpha
        matrix[8], matrix[:, 8] = gamma, np.eye(9)[8]
        return matrix

    before = transition(kept[t - 1], masked[t - 1])
    now = transition(kept[t] / kept[t - 1], 1 - (1 - masked[t]) / (1 - masked[t - 1]))
    together = now @ before
    for n in range(50):
        k, p = int(tokens[0, n]), log_p[0, :, n].exp().double().numpy()
        bayes = sum(p[j] * now[k] * before[:, j] / together[k, j] for j in range(8))
        np.testing.assert_allclose(got[0, :, n].exp().numpy(), bayes, rtol=2e-4, atol=1e-6)


AMUSED_CONFIGS = grid(axis("masking_schedule", "cosine", "linear"), axis("temperature", (2, 0), 5, (0, 0)), axis("ratio", 1.0, 0.6))


@pytest.mark.parametrize("config", AMUSED_CONFIGS, ids=case_id)
@pytest.mark.parametrize("flat", [True, False])
def test_amused(config: dict[str, Any], flat: bool) -> None:
    for steps in (4, 10, 25):
        results = []
        for s in pair("AmusedScheduler", {"mask_token_id": 63, "masking_schedule": config["masking_schedule"]}):
            s.set_timesteps(steps, config["temperature"])
            source, tokens = generator(4), torch.full((2, 36) if flat else (2, 6, 6), 63)
            samples = [s.timesteps, s.temperatures]
            for t in s.timesteps:
                logits = torch.randn(2, 62, 6, 6, generator=generator(int(t))) * 2
                logits = logits.flatten(2).transpose(1, 2) if flat else logits
                result = s.step(logits, t, tokens, starting_mask_ratio=config["ratio"], generator=source)
                tokens = result.prev_sample
                samples.extend(result.to_tuple())
            results.append([*samples, s.add_noise(tokens, s.timesteps[1], source), source.get_state()])
        for expected, got in zip(*results, strict=True):
            assert torch.equal(got, expected)
        assert (results[1][-4] != 63).all()


def test_tokens_with_a_generator_per_sample() -> None:
    for scheduler, output in (
        (ours.VQDiffusionScheduler(9), token_probabilities(9, 1)),
        (ours.AmusedScheduler(8), torch.randn(2, 50, 8, generator=generator(1))),
    ):
        scheduler.set_timesteps(4)
        tokens = torch.full((2, 50), 8)
        both = scheduler.step(output, 3, tokens, generator=[generator(5), generator(6)]).prev_sample
        for i in range(2):
            alone = scheduler.step(output[i : i + 1], 3, tokens[i : i + 1], generator=generator(5 + i)).prev_sample
            assert torch.equal(both[i : i + 1], alone)
        with pytest.raises(ValueError, match="3 entries for a batch of 2"):
            scheduler.step(output, 3, tokens, generator=[generator()] * 3)


def test_tokens_are_drawn_as_by_multinomial() -> None:
    probabilities = torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    source, other = (torch.Generator().manual_seed(7) for _ in range(2))
    expected = torch.multinomial(probabilities.flatten(0, 1), 1, generator=other).view(2, 70)
    assert torch.equal(categorical(probabilities, generator=source), expected)
    assert torch.equal(source.get_state(), other.get_state())
    with pytest.raises(ValueError, match="not finite"):
        categorical(torch.full((1, 2, 3), math.nan), generator=source)
