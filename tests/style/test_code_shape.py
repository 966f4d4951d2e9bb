"""The shape of the code: short functions and files, hints and docstrings everywhere, prints only where users look."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_train"
LONGEST_FUNCTION, NINETIETH_PERCENTILE, LONGEST_FILE = 60, 35, 400
"""In lines."""
PRINTING = {"config/door.py", "dist/rollcall.py"}
"""Where a print is meant, beside the doors: error reports of a command and of a lost rank."""
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A function or class with its place."""

    path: Path
    node: Function | ast.ClassDef
    is_public: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.node.lineno} {self.node.name}"

    @property
    def lines(self) -> int:
        assert self.node.end_lineno is not None
        return self.node.end_lineno - self.node.lineno + 1


def definitions(path: Path) -> Iterator[Found]:
    """Yield what a file defines; public is what a reader can name: not inside a function, no underscore on the way."""

    def within(node: ast.AST, is_visible: bool) -> Iterator[Found]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                is_public = is_visible and not child.name.startswith("_")
                yield Found(path, child, is_public)
                yield from within(child, is_public and isinstance(child, ast.ClassDef))
            else:
                yield from within(child, is_visible)

    yield from within(ast.parse(path.read_text()), True)


ALL = [found for path in FILES for found in definitions(path)]
FUNCTIONS = [found for found in ALL if isinstance(found.node, Function)]


def test_there_is_code_to_look_at() -> None:
    assert len(FUNCTIONS) > 200


def test_functions_are_short() -> None:
    assert [f"{found}: {found.lines} lines" for found in FUNCTIONS if found.lines > LONGEST_FUNCTION] == []
    lengths = sorted(found.lines for found in FUNCTIONS)
    assert lengths[len(lengths) * 9 // 10] <= NINETIETH_PERCENTILE


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_every_function_is_hinted() -> None:
    bare = []
    for found in FUNCTIONS:
        given = found.node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        arguments += [a for a in (given.vararg, given.kwarg) if a]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if missing or found.node.returns is None:
            bare.append(f"{found}: {missing or 'return'}")
    assert bare == []


def test_everything_public_has_a_docstring() -> None:
    assert [str(found) for found in ALL if found.is_public and not ast.get_docstring(found.node)] == []
    assert [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_doors_print(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    is_door = len(place.parts) == 1 or place.name == "__main__.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or is_door or place.as_posix() in PRINTING, f"lines {prints}"
