"""Conversion that is killed at any point goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.convert import convert, crew, encode
from dgemma.convert import converter as engine
from published import MANIFEST, floats, hashes, left
from said import says
from tiny import rewrite

GATE = "model.decoder.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return floats(tmp_path)


# ---- Interruptions --------------------------------------------------------------------------------------------

KILLED = """
import itertools, sys, time
from dgemma.convert import convert, converter, crew, encode
encode.BLOCK, encode.PIECE = 1 << 12, 1 << 10
converter.SYNC_SECONDS = 0  # else what is done in a burst, on a busy machine, is not listed before the long sleep
whole, count, enough = crew.encode, itertools.count(), int(sys.argv[4])
def slow(*args):
    time.sleep(600 if next(count) >= enough + 4 else 0.01)  # it never ends before it is killed
    return whole(*args)
crew.encode = slow
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], sys.argv[3], workers=2)
"""


@pytest.mark.parametrize("recipe", ["4bit", "nvfp4"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, recipe: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(encode, "BLOCK", 1 << 12)
    monkeypatch.setattr(encode, "PIECE", 1 << 10)
    convert(folder, tmp_path / "whole", recipe)
    draw, journal = random.Random(0), tmp_path / "out.partial" / ".dgemma" / "journal.jsonl"

    def written() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for _ in range(5):
        fresh = draw.randint(2, 12)
        enough = written() + fresh
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out"), recipe, str(fresh)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while written() < enough and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / MANIFEST).exists()
    assert written() > 10
    convert(folder, tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert left(tmp_path) == {"out", "whole"}


# ---- Worker processes -----------------------------------------------------------------------------------------

SLOW_WORKERS = """
import itertools, sys, time
from dgemma.convert import convert, converter, crew, partial
crew.SMALL, converter.SYNC_SECONDS = 0, 0
whole, count, enough = partial.Partial.note, itertools.count(), int(sys.argv[4])
def slow(self, *entry):
    time.sleep(600 if next(count) >= enough else 0.01)  # it never ends before it is killed
    whole(self, *entry)
partial.Partial.note = slow
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], sys.argv[3], workers=2)
"""


@pytest.mark.parametrize("recipe", ["4bit", "nvfp4"])
def test_workers_write_the_same_bytes_also_after_a_kill(
    folder: Path, tmp_path: Path, recipe: str, monkeypatch: Any
) -> None:
    convert(folder, tmp_path / "whole", recipe, workers=1)
    monkeypatch.setattr(crew, "SMALL", 0)
    assert not convert(folder, tmp_path / "whole", recipe, workers=2).fresh
    convert(folder, tmp_path / "two", recipe, workers=2)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "whole")
    journal = tmp_path / "out.partial" / ".dgemma" / "journal.jsonl"
    for enough in (5, 20):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_WORKERS, str(folder), str(tmp_path / "out"), recipe, str(enough)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < enough):
            time.sleep(0.002)
        process.kill()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    convert(folder, tmp_path / "out", recipe, workers=2)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_goes_wrong_in_a_worker_is_said_here(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(crew, "SMALL", 0)
    with monkeypatch.context() as patch, says("a worker process ended", "--workers"):
        patch.setattr(crew, "_START", "raise SystemExit")
        convert(folder, tmp_path / "out", workers=2)
    rewrite(folder, lambda tensors: tensors[GATE].reshape(-1).__setitem__(7, np.nan))
    with says(GATE, "NaN or infinity"):
        convert(folder, tmp_path / "out", force=True, workers=2)
    assert left(tmp_path) == {"out.partial"}


# ---- Taking up ------------------------------------------------------------------------------------------------


def test_work_that_is_done_is_not_done_again(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    count = 0
    whole = crew.encode

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 30:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(crew, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    lines = (tmp_path / "out.partial" / ".dgemma" / "journal.jsonl").read_text().splitlines()
    assert 25 <= len(lines) <= 30
    first = count
    convert(folder, tmp_path / "out", workers=1)
    items = len(json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"])
    assert count - first == items - len(lines)


def test_a_journal_cut_in_its_last_line_is_taken_up(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_complete", fails)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out")
    monkeypatch.undo()
    journal = tmp_path / "out.partial" / ".dgemma" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "other")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")


def test_a_finished_folder_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "out").fresh
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert not convert(folder, tmp_path / "out").fresh
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
