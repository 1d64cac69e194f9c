"""Contracts of the whole package: laziness, the direction of imports, signatures, size."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import sfumato
from sfumato import registry

PACKAGE = Path(sfumato.__file__).parent
CODE_CEILING = 12500
FAMILY_CEILING = 150
PIPELINES = [n for n, m in registry.PUBLIC.items() if m.startswith("families.") and hasattr(diffusers, n)]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy() -> None:
    heavy = "('torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub', 'safetensors', 'diffusers')"
    loaded = run_python(f"import sys, sfumato; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_a_class_imports_only_what_it_needs() -> None:
    code = "import sys, sfumato; sfumato.StableDiffusionPipeline; print([m for m in sys.modules if m in {names}])"
    assert run_python(code.format(names="('transformers', 'diffusers', 'accelerate', 'scipy', 'typer', 'rich')")) == "[]"


def test_wrong_name_says_what_is_near() -> None:
    with pytest.raises(AttributeError, match="did you mean 'StableDiffusionPipeline'"):
        _ = sfumato.StableDifusionPipeline


@pytest.mark.parametrize("name", sorted(registry.PUBLIC))
def test_public_name_loads_and_is_documented(name: str) -> None:
    value = getattr(sfumato, name)
    assert name in dir(sfumato)
    assert value.__doc__


def test_imports_point_one_way() -> None:
    """families -> pipelines -> (schedulers, models, media) -> (config, weights, hub)."""
    ranks = {"cli": 5, "training": 4, "families": 3, "pipelines": 2, "schedulers": 1, "models": 1, "media": 1}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        own = ranks.get(parts[0], 0)
        if parts[0] in ("registry.py", "__init__.py", "utils.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = (*parts[: len(parts) - node.level], *(node.module or "").split("."))
                names = [target[0]] if target[0] else [alias.name for alias in node.names]
                for name in names:
                    assert ranks.get(name, 0) <= own, f"{path} imports {name}"


def test_no_family_defines_call() -> None:
    """But for the irregular ones: Redux makes no pictures and runs no loop."""
    for path in (PACKAGE / "families").glob("*.py"):
        if path.name == "flux_redux.py":
            continue
        tree = ast.parse(path.read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__call__"], path


def code_lines(path: Path) -> int:
    """Lines of code: neither blank, nor comment, nor documentation."""
    text = path.read_text()
    quoted: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            quoted.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in quoted for i, line in lines)


def test_line_ceiling() -> None:
    paths = list(PACKAGE.rglob("*.py"))
    assert sum(map(code_lines, paths)) < CODE_CEILING
    longest = max(paths, key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= 600, longest


@pytest.mark.parametrize("path", sorted((PACKAGE / "families").glob("*.py")), ids=lambda path: path.stem)
def test_a_family_is_short(path: Path) -> None:
    assert code_lines(path) <= FAMILY_CEILING


def call_parameters(cls: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(cls.__call__).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", PIPELINES)
def test_call_signature_is_the_references(name: str) -> None:
    assert call_parameters(getattr(sfumato, name)) == call_parameters(getattr(diffusers, name))


@pytest.mark.parametrize("name", PIPELINES)
def test_constructor_takes_the_references_arguments(name: str) -> None:
    """The same names, those without a default in the same order; ours may have more that are optional."""

    def split(cls: Any) -> tuple[list[str], set[str]]:
        parameters = [p for p in inspect.signature(cls).parameters.values() if p.name != "self"]
        return [p.name for p in parameters if p.default is p.empty], {p.name for p in parameters}

    (expected, all_expected), (got, all_got) = split(getattr(diffusers, name).__init__), split(getattr(sfumato, name))
    assert got == [n for n in expected if n in got] and all_expected <= all_got


MODELS = [n for n, m in registry.PUBLIC.items() if m.startswith("models.") and n != "ModelMixin" and hasattr(diffusers, n)]
SCHEDULERS = [n for n in registry.PUBLIC if n.endswith("Scheduler") and hasattr(diffusers, n)]


@pytest.mark.parametrize("name", [*MODELS, *SCHEDULERS])
def test_configuration_keys_and_defaults_are_the_references(name: str) -> None:
    def defaults(cls: Any) -> dict[str, Any]:
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD}

    expected = defaults(getattr(diffusers, name))
    got = defaults(getattr(sfumato, name))
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in got.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_forward_takes_the_references_arguments(name: str) -> None:
    expected = inspect.signature(getattr(diffusers, name).forward).parameters
    assert list(inspect.signature(getattr(sfumato, name).forward).parameters) == list(expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "Multi" not in name])
def test_networks_keep_no_hidden_buffers(name: str) -> None:
    """A network built on the meta device is whole once its checkpoint is assigned."""
    needed = {"ControlNetUnionModel": {"addition_time_embed_dim": 8}}
    with torch.device("meta"):
        model = getattr(sfumato, name)(**needed.get(name, {}))
    saved = set(model.state_dict())
    assert all(n in saved for n, _ in model.named_buffers())
