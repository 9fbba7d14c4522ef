"""Conversion that is starved, raced, lied to or read back: nothing half-made ever looks whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dgemma
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.convert import convert, crew, job, recipes
from dgemma.convert import converter as engine
from dgemma.convert.partial import Partial
from published import MANIFEST, SHARD, floats, hashes, left
from said import check_line, says
from tiny import rewrite

GATE = "model.decoder.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return floats(tmp_path)


def interrupted(folder: Path, out: Path, monkeypatch: Any, **options: Any) -> None:
    """Leave a conversion half done."""

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_complete", fails)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, **options)


# ---- What can go wrong ----------------------------------------------------------------------------------------


def test_an_existing_target_is_replaced_only_by_force(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(folder, out, "8bit")
    before = hashes(out)
    with says(out.name, "exists", "--force"):
        convert(folder, out, "4bit")
    assert hashes(out) == before and left(tmp_path) == {"out"}
    convert(folder, out, "4bit", force=True)
    convert(folder, tmp_path / "fresh", "4bit")
    assert hashes(out) == hashes(tmp_path / "fresh") and left(tmp_path) == {"out", "fresh"}


def test_force_makes_a_damaged_folder_anew(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(folder, out)
    before = hashes(out)
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-4] + b"abcd")
    assert not convert(folder, out).fresh and hashes(out) != before
    assert convert(folder, out, force=True).fresh and hashes(out) == before


def test_folders_of_the_same_names_that_are_not_ours_stay(folder: Path, tmp_path: Path) -> None:
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("x")
    with says("out.partial", "in the way"):
        convert(folder, tmp_path / "out", force=True)
    (tmp_path / "out.partial" / "thesis.txt").rename(tmp_path / "thesis.txt")
    (tmp_path / "out.partial").rmdir()
    convert(folder, tmp_path / "out", force=True)
    assert (tmp_path / "out.replaced" / "thesis.txt").exists()


def test_force_takes_away_nothing_but_checkpoints(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "pictures").mkdir(parents=True)
    with says("holds more than a checkpoint"):
        convert(folder, home, force=True)
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "out"):
        with says("file", "not a folder"):
            convert(folder, place, force=True)
    for inside in (folder, folder / "out", tmp_path):
        with says("may not be the source"):
            convert(folder, inside, force=True)
    assert (home / "pictures").is_dir() and (tmp_path / "file").read_text() == "x"


def test_what_a_kill_left_is_not_taken_for_the_users(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = out / ".dgemma-0123456789abcdef.partial"
    stage.mkdir(parents=True)
    (stage / "file").write_bytes(b"half a file")
    assert convert(folder, out).fresh  # nothing else is there, so that nothing is replaced
    before = hashes(out)
    stage.mkdir()
    (stage / "encode.onnx").write_bytes(b"half a graph")
    with says("exists", "--force"):
        convert(folder, out, "8bit")
    convert(folder, out, force=True)
    assert hashes(out) == before and left(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["thesis.txt", "photo.png", "notes", ".dgemma-0123456789abcdef.partial.txt", ".ssh"])
def test_force_keeps_files_that_no_checkpoint_has(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    convert(folder, out)
    (out / name).write_text("precious")
    with says("holds more than a checkpoint", name, "--force"):
        convert(folder, out, "8bit", force=True)
    assert (out / name).read_text() == "precious" and left(tmp_path) == {"out"}


def test_what_others_put_beside_our_notes_stays(folder: Path, tmp_path: Path) -> None:
    out, theirs = tmp_path / "out", tmp_path / "out" / ".dgemma" / "thesis.txt"
    convert(folder, out)
    before = hashes(out)
    theirs.parent.mkdir()
    theirs.write_text("precious")
    (theirs.parent / "plan.json").mkdir()
    assert not convert(folder, out).fresh
    with says("holds more than a checkpoint", ".dgemma", "--force"):
        convert(folder, out, force=True)
    assert theirs.read_text() == "precious"
    shutil.rmtree(theirs.parent)
    theirs.parent.mkdir()
    (theirs.parent / "lock").write_text("")
    assert convert(folder, out, force=True).fresh and hashes(out) == before and left(tmp_path) == {"out"}


def test_other_work_in_the_same_place_is_not_mixed(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    with says("out.partial", "begun with another 'recipe'", "--force"):
        convert(folder, tmp_path / "out", "8bit")
    with says("begun with another 'mlx'"):
        convert(folder, tmp_path / "out", mlx=True)
    convert(folder, tmp_path / "out", "8bit", force=True)
    convert(folder, tmp_path / "fresh", "8bit")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_a_source_that_changes_is_noticed(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch)
    rewrite(folder, lambda tensors: tensors.update({GATE: tensors[GATE] * np.array(2, tensors[GATE].dtype)}))
    with says("begun from a source that has changed since", "--force"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", force=True)
    # Now while it runs.
    whole = crew.encode

    def touching(*args: Any) -> Any:
        os.utime(folder / "model.safetensors")
        return whole(*args)

    monkeypatch.setattr(crew, "encode", touching)
    with says("model.safetensors", "changed while it was being converted"):
        convert(folder, tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_a_source_cut_short_while_it_is_read(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = crew.encode

    def cutting(item: Any, *args: Any) -> Any:
        os.truncate(folder / "model.safetensors", 100_000)
        return whole(item, *args)

    monkeypatch.setattr(crew, "encode", cutting)
    with says("model.safetensors", "shorter"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [GATE, "model.decoder.norm.weight", "model.decoder.layers.1.router.proj.weight"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, name: str, value: float, dtype: str) -> None:
    folder = floats(tmp_path, dtype=dtype)
    rewrite(folder, lambda tensors: tensors[name].reshape(-1).__setitem__(-3, value))
    with says(name, "NaN or infinity"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_once_do_not_mix(folder: Path, tmp_path: Path) -> None:
    code = f"""
import time
from dgemma.convert import convert, converter, crew
whole = crew.encode
def slow(*args):
    print("in", flush=True)
    time.sleep(600)
crew.encode = slow
convert({str(folder)!r}, {str(tmp_path / "out")!r}, workers=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        with says("another dgemma convert is at work"):
            convert(folder, tmp_path / "out")
        with says("another dgemma convert is at work"):
            convert(folder, tmp_path / "out", "8bit", force=True)
    finally:
        process.kill()
        process.communicate()
    convert(folder, tmp_path / "out", verify=True)  # the lock went with the process


def test_a_full_disk_is_said_before_anything_is_written(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with says("GB more are needed on this disk"):
        convert(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*/*.safetensors")) or left(tmp_path) <= {"out.partial"}


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    """A disk of 128 KiB that claims to have room: a real one where mounting is allowed, else a pretended one."""
    place = tmp_path / "disk"
    place.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    real = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not real:
        whole, room = Partial.write, 100_000

        def write(self: Partial, shard: str, offset: int, data: memoryview) -> None:
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / shard))
            whole(self, shard, offset, data)

        monkeypatch.setattr(Partial, "write", write)
    yield place
    if real:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way(folder: Path, small_disk: Path, monkeypatch: Any) -> None:
    with says("disk is full", "goes on where it stopped"):
        convert(folder, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]
    assert not (small_disk / "out.partial" / MANIFEST).exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_target_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: Any, code: int) -> None:
    whole = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if "out.partial" in str(self):
            raise OSError(code, os.strerror(code), str(self))
        whole(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with says("out.partial", os.strerror(code)):
        convert(folder, tmp_path / "out")
    assert left(tmp_path) == set()


def test_a_converter_that_skips_weights_is_caught(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def skipping(source: Any, recipe: Any, **options: Any) -> Any:
        items = decide(source, recipe, **options)
        plain = {item.weight.name: item for item in decide(source, recipes.find("bf16"), **options)}
        return tuple(plain[item.weight.name] if ".experts." in item.weight.name else item for item in items)

    decide = job.decide
    monkeypatch.setattr(job, "decide", skipping)
    with says("the recipe quantizes", "experts"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Verification ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "config.json"])
def test_verify_finds_one_flipped_bit(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    convert(folder, out, verify=True)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with says(name, "SHA-256"):
        convert(folder, out, verify=True)


def test_verify_compares_with_the_source_not_only_with_itself(folder: Path, tmp_path: Path) -> None:
    """A shard that was wrong from the start, with a manifest to match."""
    out = tmp_path / "out"
    convert(folder, out)
    place = Checkpoint.open(out).files[0].entries[GATE.removesuffix("weight") + "scales"]
    data = bytearray((out / SHARD).read_bytes())
    data[place.start : place.start + 2] = np.array([1.0], ml_dtypes.bfloat16).tobytes()
    (out / SHARD).write_bytes(data)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][SHARD]["sha256"] = hashlib.sha256(data).hexdigest()
    (out / MANIFEST).write_text(json.dumps(manifest))
    with says(GATE, "error"):
        convert(folder, out, verify=True)


def test_errors_of_the_api_are_one_line(tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: convert(tmp_path / "nothing", tmp_path / "out"),
        lambda: convert("no/such/model/here", tmp_path / "out"),
        lambda: convert(floats(tmp_path), Path("\0")),
    ]
    for call in calls:
        with pytest.raises(dgemma.DgemmaError) as caught:
            call()
        check_line(caught.value)
