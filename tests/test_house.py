"""How the house is built: which room may import which, no circles, no file that is two, a core that asks nobody's type.

Imports are read from the source, those inside functions and those for type hints alone included.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    ("core",),  # what a reader must know: nothing but NumPy under it
    ("checkpoints",),
    ("text",),
    ("convert", "export"),  # neither knows the other
    ("backends",),  # ONNX Runtime's runs the graphs that `export` writes
    ("constraints",),  # needs the tokenizer alone; which backend runs the passes is nothing to it
    ("canvas",),  # what is done on one besides writing; a loaded model calls it
    ("diffusion.py",),  # a loaded model
    ("runtime.py",),  # which loads it
    ("tools", "show"),
    ("cli",),
    ("__init__.py", "__main__.py"),
)
"""Rooms, lowest first. A file imports from its own room and from lower ones; rooms of one line are apart."""

WINGS = {"onnx": {"numpy"}, "cuda": {"torch"}, "torch": {"cuda"}}
"""Which backend may import which other; `torch` opens the one for cards where it is asked for a card."""

LIBRARIES = {"core": {"numpy", "ml_dtypes", "psutil"}}
"""What a room may import besides the standard library, where that is said."""

LONGEST, CORE = 400, 4700
"""Lines of a file, and of all files of core."""

HEIGHT = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
FILES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for name in HEIGHT
    for path in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
}
ASKED = re.compile(r"isinstance\((?:self\.)?(?:ops|length|span\.rows)\b")


def home(names: list[str]) -> Path | None:
    """Return the file of a module, if it is one of the package's."""
    path = Path(*names)
    found = (path.with_suffix(".py") if names else path, path / "__init__.py")
    return next((one for one in found if one in FILES), None)


def imported(path: Path) -> Iterator[tuple[int, Path | str]]:
    """Yield what a file imports, with the line: files of the package, and names of other packages."""
    for node in ast.walk(ast.parse(FILES[path])):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name.partition(".")[0]) for one in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, str(node.module).partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            up = path.parts[: len(path.parts) - node.level]
            base = [*up, *(node.module.split(".") if node.module else [])]
            for one in node.names:
                found = home([*base, one.name]) or home(base)
                assert found is not None, f"{path}:{node.lineno} imports {one.name} from nowhere"
                yield node.lineno, found


EDGES = {path: list(imported(path)) for path in FILES}


def room(path: Path) -> str:
    return path.parts[0]


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.name for path in ROOT.glob("*.py")}
    assert rooms == HEIGHT.keys()


def test_no_circles() -> None:
    inside = {path: {one for _, one in found if isinstance(one, Path)} - {path} for path, found in EDGES.items()}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " → ".join(map(str, error.args[1])))


def test_imports_lead_down() -> None:
    wrong = [
        f"{path}:{line} imports {one}"
        for path, found in EDGES.items()
        for line, one in found
        if isinstance(one, Path) and room(one) != room(path) and HEIGHT[room(one)] >= HEIGHT[room(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_backends_leave_each_other_alone() -> None:
    wings = {path: path.parts[1] for path in FILES if room(path) == "backends" and len(path.parts) > 2}
    wrong = [
        f"{path}:{line} imports {one}"
        for path, wing in wings.items()
        for line, one in EDGES[path]
        if isinstance(one, Path) and one in wings and wings[one] not in {wing, *WINGS.get(wing, ())}
    ]
    assert not wrong, "\n".join(wrong)


def test_core_needs_little() -> None:
    wrong = [
        f"{path}:{line} imports {one}"
        for path, found in EDGES.items()
        for line, one in found
        if isinstance(one, str) and room(path) in LIBRARIES
        and one not in {"__future__", *sys.stdlib_module_names, *LIBRARIES[room(path)]}
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", list(HEIGHT))
def test_files_hold_one_idea(name: str) -> None:
    lines = {path: text.count("\n") for path, text in FILES.items() if room(path) == name}
    long = [f"{path}: {count} lines" for path, count in lines.items() if count > LONGEST]
    assert not long, "\n".join(long)


def test_core_is_small() -> None:
    assert sum(text.count("\n") for path, text in FILES.items() if room(path) == "core") <= CORE


def test_core_asks_nobody_what_it_is() -> None:
    wrong = [
        f"{path}:{i}: {line.strip()}"
        for path, text in FILES.items()
        if room(path) == "core"
        for i, line in enumerate(text.splitlines(), 1)
        if ASKED.search(line)
    ]
    assert not wrong, "\n".join(wrong)
