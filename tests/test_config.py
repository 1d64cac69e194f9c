"""Configuration: recorded from constructors, carried between classes, kept in JSON without loss."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.config import ConfigMixin, FrozenConfig, read_json

SCHEDULERS = [n for n in dir(sfumato) if n.endswith("Scheduler") and hasattr(diffusers, n)]
REQUIRED = {"mask_token_id": 3, "num_vec_classes": 5}


class Sample(ConfigMixin):
    """A configurable class of no use."""

    def __init__(self, a: Any = 1, b: Any = "x", c: Any = (1, 2), d: Any = None) -> None:
        self.sum = (a, b, c, d)


# JSON has no NaN; keys that begin with "_" are the format's own
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
unknown = st.dictionaries(st.text().filter(lambda k: not k.startswith("_") and k not in "abcd"), values, max_size=3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=st.dictionaries(st.sampled_from("abcd"), values), extra=unknown)
def test_json_round_trip_is_the_identity(tmp_path: Path, known: dict[str, Any], extra: dict[str, Any]) -> None:
    first = Sample.from_config({**known, **extra})
    first.save_config(tmp_path)
    second = Sample.from_config(read_json(tmp_path / "config.json"))
    public = {k: v for k, v in first.config.items() if not k.startswith("_")}
    assert public == {"a": 1, "b": "x", "c": [1, 2], "d": None, **known, **extra}
    assert {k: v for k, v in second.config.items() if not k.startswith("_")} == public
    assert second.to_json_string() == first.to_json_string()


def test_arrays_and_paths_are_written_plainly() -> None:
    made = Sample(a=np.arange(3), b=Path("x/y"), c=np.float32(0.5), d={"k": (np.int64(1),)})
    written = json.loads(made.to_json_string())
    assert {k: written[k] for k in "abcd"} == {"a": [0, 1, 2], "b": "x/y", "c": 0.5, "d": {"k": [1]}}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_written_file_is_the_references(name: str, tmp_path: Path) -> None:
    known = inspect.signature(getattr(sfumato, name)).parameters
    options = {k: v for k, v in {"beta_start": 0.00085, "beta_end": 0.012, "rho": 5.0, **REQUIRED}.items() if k in known}
    getattr(diffusers, name)(**options).save_pretrained(tmp_path / "theirs")
    getattr(sfumato, name)(**options).save_pretrained(tmp_path / "ours")
    expected, got = (read_json(tmp_path / side / "scheduler_config.json") for side in ("theirs", "ours"))
    assert got == expected


def test_written_network_file_is_the_references(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path / "theirs")
    sfumato.UNet2DConditionModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    expected, got = (read_json(tmp_path / side / "config.json") for side in ("theirs", "ours"))
    assert {k: v for k, v in got.items() if k != "_name_or_path"} == {k: v for k, v in expected.items() if k != "_name_or_path"}


# UnCLIP refuses every table but its own.
@pytest.mark.parametrize("other", [n for n in SCHEDULERS if n != "UnCLIPScheduler"])
def test_from_config_across_classes_and_back(other: str) -> None:
    ddim = sfumato.DDIMScheduler(beta_start=0.00085, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    known = inspect.signature(getattr(sfumato, other)).parameters
    needed: dict[str, Any] = {k: v for k, v in REQUIRED.items() if k in known}
    there = getattr(sfumato, other).from_config(ddim.config, **needed)
    expected = getattr(diffusers, other).from_config(theirs.config, **needed)
    shared = [k for k in expected.config if not k.startswith("_")]
    assert {k: there.config[k] for k in shared} == {k: expected.config[k] for k in shared}
    back = sfumato.DDIMScheduler.from_config(there.config)
    public = {k: v for k, v in ddim.config.items() if not k.startswith("_")}
    assert {k: back.config[k] for k in public} == public


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "from_the_future": [1]}))
    model = sfumato.UNet2DConditionModel.from_pretrained(tmp_path)
    assert model.config.from_the_future == [1]
    model.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["from_the_future"] == [1]


def test_unknown_keyword_says_what_is_near(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path)
    tiny.scheduler().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"DDIMScheduler\(\) has no argument 'beta_strat'; did you mean 'beta_start'"):
        sfumato.DDIMScheduler(beta_strat=1)
    with pytest.raises(
        sfumato.ConfigError, match=r"DDIMScheduler has no configuration key 'beta_strat'; did you mean 'beta_start'"
    ):
        sfumato.DDIMScheduler.from_config({}, beta_strat=1)
    with pytest.raises(sfumato.ConfigError, match=r"no configuration key 'steps_ofset'; did you mean 'steps_offset'"):
        sfumato.DDIMScheduler.from_pretrained(tmp_path, steps_ofset=1)
    with pytest.raises(sfumato.ConfigError, match=r"no configuration key 'in_chanels'; did you mean 'in_channels'"):
        sfumato.UNet2DConditionModel.from_pretrained(tmp_path, in_chanels=4)


@pytest.mark.parametrize("text", ["{", "", "\xff\xfe", '{"a": }'])
def test_wrong_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(sfumato.ConfigError, match=rf"{tmp_path / 'config.json'} is missing or not valid JSON .*download or write"):
        sfumato.UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("5", "int"), ('"a"', "str")])
def test_json_that_is_no_object(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(sfumato.ConfigError, match=rf"scheduler_config.json holds a JSON {kind}, expected an object"):
        sfumato.DDIMScheduler.from_pretrained(tmp_path)


def test_configuration_of_another_class(tmp_path: Path) -> None:
    tiny.vae().save_pretrained(tmp_path)
    with pytest.raises(
        sfumato.ConfigError, match=r"config.json describes a AutoencoderKL, not a UNet.*: load it with sfumato.AutoencoderKL"
    ):
        sfumato.UNet2DConditionModel.from_pretrained(tmp_path)


def test_value_of_a_wrong_type(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path)
    with pytest.raises(sfumato.ConfigError, match=r"UNet2DConditionModel cannot be built: a configuration value has a wrong type"):
        sfumato.UNet2DConditionModel.from_pretrained(tmp_path, block_out_channels=5)


@pytest.mark.parametrize("config", [None, "folder", ["a"]])
def test_from_config_of_no_mapping(config: Any) -> None:
    with pytest.raises(sfumato.ConfigError, match=r"from_config takes a configuration mapping, not \w+; .*use `from_pretrained`"):
        sfumato.DDIMScheduler.from_config(config)


def test_required_key() -> None:
    class Strict(ConfigMixin):
        def __init__(self, width: int, depth: int = 1) -> None:
            self.size = width * depth

    with pytest.raises(sfumato.ConfigError, match=r"configuration of Strict lacks the required key\(s\) width"):
        Strict.from_config({"depth": 2})


def test_configuration_is_read_only() -> None:
    config = Sample().config
    for change in (lambda: config.update(a=2), lambda: config.__setitem__("a", 2), lambda: setattr(config, "a", 2), config.clear):
        with pytest.raises(TypeError, match=r"read-only: build a changed object with `from_config"):
            change()
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(pickle.loads(pickle.dumps(config)), FrozenConfig)
