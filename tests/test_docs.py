"""The Python of the README and the guides: names exist, and calls fit the signatures of what is called."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sfumato

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
]
MAKERS = ("from_pretrained", "from_pipe", "from_config", "from_unet")


class Reader(ast.NodeVisitor):
    """Follows which variables hold objects of which public class, and checks what is called on them."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {"sfumato": sfumato}

    def value(self, node: ast.expr) -> Any:
        """The class or function that an expression names, or the class of the object that it makes; ``None`` for anything else."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.value(node.value)) is not None:
            return getattr(owner, node.attr) if owner is sfumato or hasattr(owner, node.attr) else None
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
                return self.value(node.func.value)
            made = self.value(node.func)
            return made if inspect.isclass(made) and isinstance(node.func, ast.Attribute) else None
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] == "sfumato":
            module = __import__(node.module, fromlist=["_"])
            self.known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.known[node.targets[0].id] = self.value(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.value(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = self.value(node.func)
        if isinstance(node.func, ast.Name) and inspect.isclass(called):  # an object of the class is called
            called = called.__call__
        if not callable(called):
            return
        names = [k.arg for k in node.keywords if k.arg]
        positional = [a for a in node.args if not isinstance(a, ast.Starred)]
        bound = not inspect.isclass(called) and "self" in inspect.signature(called).parameters
        inspect.signature(called).bind_partial(*([None] if bound else []), *positional, **dict.fromkeys(names))


@pytest.mark.parametrize("code", BLOCKS)
def test_an_example_calls_what_there_is(code: str) -> None:
    Reader().visit(ast.parse(code))


def broken() -> Iterator[Any]:
    make = "pipe = sfumato.StableDiffusionPipeline.from_pretrained('x')\n"
    yield pytest.param("sfumato.StableDifusionPipeline", AttributeError, id="class")
    yield pytest.param(make + "pipe('a cat', guidence_scale=3.0)", TypeError, id="argument of a call")
    yield pytest.param(make + "pipe.enable_freeu(1, 2, 3, 4, 5)", TypeError, id="argument of a method")
    yield pytest.param("from sfumato.pipelines.tasks import Tusk", AttributeError, id="import")


@pytest.mark.parametrize(("code", "error"), broken())
def test_a_broken_example_would_be_found(code: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Reader().visit(ast.parse(code))
