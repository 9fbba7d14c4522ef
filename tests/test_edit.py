"""Edit: what is outside the region stays byte for byte, strength 0 keeps it too, a long region is done in parts."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgemma
from dgemma.canvas.edit import Edited, job_of, region
from dgemma.core.options import GenerateOptions
from said import says
from spellings import checkpoint
from test_fill import CONTROL, files, text_of
from tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edit")


@pytest.fixture(scope="module")
def model(where: Path) -> Iterator[dgemma.DiffusionGemma]:
    yield dgemma.load(checkpoint(where, "gemma"), backend="torch")


TEXT = "import os\n\n\ndef f(x):\n    return x + 1\n\n\nprint(f(2))\n"


def outside(result: Edited, text: str, start: int, end: int) -> None:
    assert result.before == text
    assert result.text[:start] == text[:start] and result.start == start
    assert result.text[result.end :] == text[end:]


@pytest.mark.parametrize("strength", [0, 0.0, 0.3, 1, 1.0])
def test_outside_the_region_nothing_changes(model: dgemma.DiffusionGemma, strength: float) -> None:
    result = model.edit(TEXT, lines=(4, 5), instruction="Add a docstring.", strength=strength, steps=2)
    outside(result, TEXT, 12, 38)
    assert result.changed == (strength > 0)
    assert (result.stats is None) == (strength == 0)


@pytest.mark.parametrize("seed", range(15))
def test_regions_of_real_files(model: dgemma.DiffusionGemma, seed: int) -> None:
    draw = random.Random(seed)
    text = text_of(draw.choice(files()))
    at = draw.randrange(max(len(text) - 500, 1))
    text = text[at : at + 500]
    if seed % 3 == 0:
        text = text.replace("\n", "\r\n")
    start, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    result = model.edit(text, span=(start, end), instruction="Shorter." if seed % 2 else None, strength=0.5, steps=1)
    outside(result, text, start, end)
    assert model.edit(text, span=(start, end), strength=0).text == text


def test_a_canvas_starts_from_the_old_text_and_filler(model: dgemma.DiffusionGemma) -> None:
    job = job_of(model, TEXT, (12, 38), None, 0.25, GenerateOptions())
    assert job is not None
    request = job.request(job.window(job.laid, 0, 0), job.prompt, seed=0, drafts=False)
    room = job.laid.rooms[0]
    assert request.strength == 0.25 and len(request.init) == room
    assert model.tokenizer.decode(request.init) == TEXT[12:38]
    assert set(request.init[len(job.parts[0]) :]) == {int(job.filler[0])} and int(job.filler[0]) in CONTROL
    assert set(request.held[:room]) == {-1} and -1 not in request.held[room:]


def test_a_long_region_is_done_part_by_part(model: dgemma.DiffusionGemma) -> None:
    text = "".join(f"line {i} of many\n" for i in range(12)) + "x" * 90 + "\nend\n"
    job = job_of(model, text, (0, len(text) - 5), "Count down.", 0.5, GenerateOptions())
    assert job is not None and len(job.parts) > 4
    assert all(0 < len(part) <= 16 for part in job.parts)
    first = job.window(job.laid, 0, 0)
    behind = first.held[job.laid.rooms[0] :]
    assert len(first.held) == 32 and behind == (*job.parts[1], *job.parts[2])[: len(behind)]
    result = model.edit(text, lines=(1, 13), instruction="Count down.", strength=0.5, steps=1)
    assert result.text.endswith("\nend\n") and result.stats is not None and result.stats.canvases == len(job.parts)


def test_line_ends_are_the_texts_own(model: dgemma.DiffusionGemma) -> None:
    text = "one\r\ntwo\r\nthree\r\nfour\r\n"
    for seed in range(5):
        result = model.edit(text, lines=(2, 3), strength=1, seed=seed, steps=1)
        outside(result, text, 5, 15)
        assert result.text.count("\n") == result.text.count("\r\n")


def test_the_instruction_and_the_region_are_in_the_prompt(model: dgemma.DiffusionGemma) -> None:
    job = job_of(model, TEXT, (12, 38), "Add a docstring.", 1, GenerateOptions())
    assert job is not None
    said = model.tokenizer.decode(job.prompt, special=True)
    assert "changed: Add a docstring." in said and f"-----\n{TEXT[12:38]}\n-----" in said
    assert said.endswith("<|turn>model\n")


def test_a_region_of_nothing_is_written_into(model: dgemma.DiffusionGemma) -> None:
    outside(model.edit("ab", span=(1, 1), steps=1), "ab", 1, 1)
    outside(model.edit("", span=(0, 0), steps=1), "", 0, 0)


@pytest.mark.parametrize(
    "text, lines, span",
    [
        ("a\nb\nc", (1, 1), (0, 1)),
        ("a\nb\nc", (2, 3), (2, 5)),
        ("a\nb\nc\n", (3, 3), (4, 5)),
        ("a\r\nb\rc\n", (2, 2), (3, 4)),
        ("\n\n", (1, 2), (0, 1)),
        ("", (1, 1), (0, 0)),
        ("a\x0bb\u2028c\nd", (1, 1), (0, 5)),
    ],
)
def test_lines(text: str, lines: tuple[int, int], span: tuple[int, int]) -> None:
    assert region(text, lines, None) == span


def test_a_diff_is_what_patch_reads(model: dgemma.DiffusionGemma, tmp_path: Path) -> None:
    for old, new in (
        ("a\nb\nc\n", "a\nB\nc\n"),
        ("a\nb", "a\nb\n"),
        ("a\r\nb\r\n", "a\r\nx\r\n"),
        ("a\x0cb\nc", "a\x0cd\nc"),
    ):
        made = Edited(text=new, before=old, start=0, end=len(new), stats=None)
        (tmp_path / "file").write_bytes(old.encode())
        subprocess.run(["patch", "-s", "--binary", "file"], cwd=tmp_path, input=made.diff("file").encode(), check=True)
        assert (tmp_path / "file").read_bytes() == new.encode()
    assert Edited(text="a", before="a", start=0, end=1, stats=None).diff() == ""


def test_what_cannot_be_edited_is_said_before_any_pass(model: dgemma.DiffusionGemma, where: Path) -> None:
    for given, words in (
        ({}, ("one of them",)),
        ({"lines": (1, 1), "span": (0, 1)}, ("one of them",)),
        ({"lines": (0, 1)}, ("0 to 1", "lines 1 to 8")),
        ({"lines": (3, 9)}, ("3 to 9", "lines 1 to 8")),
        ({"lines": (3, 2)}, ("3 to 2",)),
        ({"lines": 3}, ("lines is 3", "two integers")),
        ({"lines": ("1", 2)}, ("lines", "integer")),
        ({"span": (0, 1000)}, ("span", "characters")),
        ({"lines": (1, 1), "strength": 2}, ("strength is 2", "0", "1")),
        ({"lines": (1, 1), "strength": "x"}, ("strength",)),
        ({"lines": (1, 1), "instruction": 3}, ("instruction is 3",)),
        ({"lines": (1, 1), "thinking": True}, ("thinking",)),
        ({"lines": (1, 1), "stop": "x"}, ("stop",)),
        ({"lines": (1, 1), "raw": True, "instruction": "x"}, ("raw", "instruction")),
    ):
        with says(*words):
            model.edit(TEXT, **given)  # type: ignore[arg-type]
    with says("expected text"):
        model.edit(b"x", lines=(1, 1))  # type: ignore[arg-type]
    with says("context is 4,096"):
        model.edit("word " * 6000, span=(29_000, 29_010))
    folder = tiny_checkpoint(where, name="bare")
    (folder / "chat_template.jinja").unlink()
    with says("no chat template", "instruction"):
        dgemma.load(folder, backend="numpy").edit(TEXT, lines=(1, 1), instruction="x")
    assert model.engine.busy == 0
