"""Packages import leftwards only: errors < config < dist < ops < moe < models < ... < the doors. Lazy imports count."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_train"
ORDER = [
    {"errors"},
    {"config"},
    {"dist"},
    {"ops"},
    {"moe"},
    {"models"},
    {"data", "parallel", "observe", "layers"},
    {"checkpoint"},
    {"training", "planning", "inference", "interop", "benchmark", "agents"},
]
"""Those in one set do not import each other. What is in none of them is a door: it may import all, and no door. So is
the ``__main__`` of a room."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_rooms(tree: ast.AST, parent: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield line and room of each import of the package, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parent[: len(parent) - node.level + 1] if node.level else ()
            module = [*above, node.module] if node.module else above
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name and rest:
                yield node.lineno, rest.split(".")[0]


def violations(path: Path) -> list[str]:
    """Return the imports of a file that go rightwards or sideways."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    room = "a door" if place[-1] == "__main__" else place[0]  # python -m moe_train.agents
    found = imported_rooms(ast.parse(path.read_text()), (PACKAGE.name, *place[:-1]))
    doors = len(ORDER)
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {other}"
        for line, other in found
        if other != room and LEVEL.get(other, doors) >= LEVEL.get(room, doors)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_leftwards(path: Path) -> None:
    assert violations(path) == []


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= LEVEL.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import moe_train.moe.layer",
        "from moe_train.moe import layer",
        "from moe_train import moe",
        "from ..moe import layer",
        "from .. import moe",
        "def lazily():\n    from moe_train.moe.layer import MoELayer",
        "if TYPE_CHECKING:\n    from moe_train.moe.layer import MoELayer",
    ],
)
def test_an_import_is_seen_in_every_form(source: str) -> None:
    assert [room for _, room in imported_rooms(ast.parse(source), ("moe_train", "ops"))] == ["moe"]
