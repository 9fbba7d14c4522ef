"""The weight files of a folder: one, or several and an index that says which tensor is in which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..core.errors import DgemmaError, quoted, shown
from . import foreign, names
from .files import read_json
from .links import inside, present, weight_file
from .safetensors import SafetensorsFile

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_files(folder: Path) -> tuple[SafetensorsFile, ...]:
    single, index = present(folder / _SINGLE), present(folder / _INDEX)
    if single and index and not _lists_only(folder, _SINGLE):
        raise DgemmaError(
            f"{shown(folder)}: holds both {_SINGLE} and {_INDEX}, and they may disagree; remove the one that is stale"
        )
    if single:
        return (SafetensorsFile.open(weight_file(folder, _SINGLE)),)
    if not index:
        raise foreign.no_weights(folder, _SINGLE, _INDEX)
    where = shown(folder / _INDEX)
    listed = _read_index(read_json(inside(folder, _INDEX)), where)
    files = []
    owners: dict[str, str] = {}
    for file_name in sorted(set(listed.values())):
        if not present(folder / file_name) and all(names.dispensable(n) for n, at in listed.items() if at == file_name):
            continue  # of the image tower, say, in a folder that was made for text
        if not present(folder / file_name):
            raise DgemmaError(f"{shown(folder / file_name)}: no such file, but the index names it; download it")
        file = SafetensorsFile.open(weight_file(folder, file_name))
        for name in file.entries:
            if name in owners:
                raise DgemmaError(f"{where}: {quoted(name)} is in two files, {owners[name]} and {file_name}")
            owners[name] = file_name
        files.append(file)
    lost = [
        name
        for name, file_name in listed.items()
        if owners.get(name) != file_name and (name in owners or not names.dispensable(name))
    ]
    if lost:
        said = [f"{quoted(name)} in {listed[name]}" for name in lost]
        raise DgemmaError(f"{where}: {count('not in the files it names', said)}")
    strays = [name for name in owners if name not in listed and not names.dispensable(name)]
    if strays:
        raise DgemmaError(f"{where}: {count('in the files but not listed', list(map(quoted, strays)))}")
    return tuple(files)


def _lists_only(folder: Path, name: str) -> bool:
    """Whether an index names one file only; MLX writes one beside a single file."""
    table = read_json(inside(folder, _INDEX)).get("weight_map")
    return isinstance(table, dict) and set(map(str, table.values())) == {name}


def _read_index(data: dict[str, Any], where: str) -> dict[str, str]:
    """Return the file name of each tensor."""
    table = data.get("weight_map")
    if not isinstance(table, dict) or not table or not data.keys() <= {"weight_map", "metadata"}:
        raise DgemmaError(f"{where}: expected the keys weight_map (tensor names to file names) and metadata")
    for name, file_name in table.items():
        plain = isinstance(file_name, str) and re.fullmatch(r"\w[\w.-]{0,60}\.safetensors", file_name, re.ASCII)
        if not plain:
            raise DgemmaError(
                f"{where}: {quoted(name)} is said to be in {quoted(file_name, 40)}; "
                "expected the plain name of a .safetensors file in the same folder"
            )
    return table


def count(what: str, items: list[str]) -> str:
    """Return "3 tensors missing: a, b, ...", with as many items as fit a line."""
    said = items[:1]
    for item in items[1:]:
        if len(", ".join([*said, item])) > 120:
            break
        said.append(item)
    more = ", ..." if len(items) > len(said) else ""
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''} {what}: {', '.join(said)}{more}"
