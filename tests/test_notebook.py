"""The notebook in examples/ runs from top to bottom, and warns of nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook" / "canvas.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("notebook")
    book: Any = nbformat.read(NOTEBOOK, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell("import warnings\nwarnings.simplefilter('error')"))
    book.cells.append(nbformat.v4.new_code_cell("warnings.simplefilter('ignore')"))  # ipykernel's own, when it ends
    with pytest.MonkeyPatch.context() as patch:  # nobody's own settings
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        options: Any = {"resources": {"metadata": {"path": str(folder)}}}
        NotebookClient(book, timeout=240, kernel_name="python3", **options).execute()
    assert (folder / "run.jsonl").is_file()
    return book.cells[1:-1]


def outputs(cell: Any) -> str:
    return "".join(
        str(one.get("text") or one["data"].get("text/html") or one["data"]["text/plain"]) for one in cell.outputs
    )


def test_it_is_kept_without_outputs() -> None:
    book: Any = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


def test_it_warns_of_nothing(cells: list[Any]) -> None:
    streams = [one for cell in cells if cell.cell_type == "code" for one in cell.outputs]
    assert [one for one in streams if one.get("name") == "stderr" or one.output_type == "error"] == []


def test_it_shows_what_it_says(cells: list[Any]) -> None:
    loaded, watched, numbers, settings, kept, replayed = (outputs(cell) for cell in cells if cell.cell_type == "code")
    assert "nano" in loaded
    for shown in (watched, kept, replayed):
        assert shown.count("data-dgemma") == 2 and '"live":false' in shown, "one output, which was drawn over"
    assert "354621" in watched and "<Generation" in watched
    assert "a harder board" in kept and "a harder board" in replayed and "<Generation" not in kept
    assert "mean entropy" in numbers and re.search(r"\(\d+, 36\)", numbers)
    same = re.findall(r"(\d+) of (\d+) characters", settings)
    assert len(same) > 1 and same[-1][0] == same[-1][1] == "41"
    assert int(replayed.rpartition("\n")[2].rpartition(">")[2]) >= len(same)
