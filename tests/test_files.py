"""Files at names that others chose: never written through, never waited for, never read beyond their kind."""

from __future__ import annotations

import errno
import os
import runpy
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoints import files
from dgemma.checkpoints.checkpoint import resolve
from dgemma.cli import options
from said import says

CANARY = b"the user's own"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "canary"
    path.parent.mkdir()
    path.write_bytes(CANARY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def socket_at(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


IN_THE_WAY: dict[str, Callable[[Path, Path], Any]] = {
    "a link": lambda path, canary: path.symlink_to(canary),
    "a link ": lambda path, canary: path.symlink_to(canary.parent / "nothing"),
    "a link  ": lambda path, canary: path.symlink_to("/dev/null"),
    "a folder": lambda path, canary: path.mkdir(),
    "a pipe": lambda path, canary: os.mkfifo(path),
    "a socket": lambda path, canary: socket_at(path),
}


# ---- Writing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_no_file_is_not_written_over(folder: Path, canary: Path, kind: str) -> None:
    path = folder / "x.json"
    IN_THE_WAY[kind](path, canary)
    before = os.lstat(path)
    with says("x.json", kind.strip(), "remove it"):
        files.write_text(path, "new")
    assert os.lstat(path) == before and os.listdir(folder) == ["x.json"]
    assert canary.read_bytes() == CANARY and os.listdir(canary.parent) == ["canary"]


def test_a_link_that_comes_while_it_is_written_is_replaced_and_not_followed(folder: Path, canary: Path) -> None:
    with files.replace_when_done(folder / "x") as file:
        file.write(b"new")
        (folder / "x").symlink_to(canary)
    assert not (folder / "x").is_symlink() and (folder / "x").read_bytes() == b"new"
    assert canary.read_bytes() == CANARY


def test_a_folder_that_is_exchanged_while_it_is_written(folder: Path, canary: Path) -> None:
    with files.replace_when_done(folder / "canary") as file:
        file.write(b"new")
        folder.rename(folder.with_name("old"))
        folder.symlink_to(canary.parent)
    assert canary.read_bytes() == CANARY and (folder.with_name("old") / "canary").read_bytes() == b"new"


def test_other_names_of_a_file_keep_their_contents(folder: Path, canary: Path) -> None:
    os.link(canary, folder / "x")
    files.write_bytes(folder / "x", b"new")
    assert (folder / "x").read_bytes() == b"new" and canary.read_bytes() == CANARY


def test_a_fresh_name_is_opened_exclusively(folder: Path, canary: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0")
    (folder / ".dgemma-0.partial").symlink_to(canary)
    with says("x", "File exists"):
        files.write_bytes(folder / "x", b"new")
    assert canary.read_bytes() == CANARY


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_the_old_file_and_nothing_else(folder: Path, error: BaseException) -> None:
    (folder / "x").write_bytes(b"old")

    def write() -> None:
        with files.replace_when_done(folder / "x") as file:
            file.write(b"half")
            raise error

    if isinstance(error, OSError):
        with says(f"{folder.name}/x", "the disk is full"):
            write()
    else:
        with pytest.raises(type(error)):
            write()
    assert os.listdir(folder) == ["x"] and (folder / "x").read_bytes() == b"old"


def test_what_a_file_may_be_read_by_stays(folder: Path) -> None:
    (folder / "x").write_bytes(b"old")
    (folder / "x").chmod(0o640)
    files.write_bytes(folder / "x", b"new")
    assert stat.S_IMODE((folder / "x").stat().st_mode) == 0o640
    files.write_bytes(folder / "x", b"new", private=True)
    assert stat.S_IMODE((folder / "x").stat().st_mode) == 0o600


def test_names_that_no_file_can_have(folder: Path) -> None:
    files.write_bytes(folder / ("ä" * 127 + "x"), b"1")  # 255 bytes
    for name in ("x" * 256, "ä" * 128, "x/" * 3000 + "x", "\0", "\ud800", ".."):
        with says():
            files.write_bytes(folder / name, b"1")
    with says("no folder"):
        files.write_bytes(folder / "none" / "x", b"1")
    with says("is not a folder"):
        (folder / "file").touch()
        files.write_bytes(folder / "file" / "x", b"1")
    files.write_text(folder / os.fsdecode(b"\xff"), os.fsdecode(b"\xff"))
    assert Path(os.fsdecode(bytes(folder) + b"/\xff")).read_bytes() == b"\xff"
    with says("half a character"):
        files.write_text(folder / "y", "\ud800")


# ---- Reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a link  "])
def test_only_regular_files_are_opened(folder: Path, canary: Path, kind: str) -> None:
    IN_THE_WAY[kind](folder / "x", canary)
    with says("x", "not a regular file"):
        files.read_text(folder / "x", 100)


def test_files_of_the_kernel_are_not_read(folder: Path) -> None:
    for name in ("/proc/self/environ", "/proc/kcore"):
        if os.path.exists(name):
            (folder / "x").unlink(missing_ok=True)
            (folder / "x").symlink_to(name)
            with says("x"):
                files.read_text(folder / "x", 1 << 20)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(folder: Path, monkeypatch: Any) -> None:
    look = os.stat

    def late(path: Any, **options: Any) -> os.stat_result:
        (folder / "x").touch()
        found = look(path, **options)
        (folder / "x").unlink()
        os.mkfifo(folder / "x")
        return found

    monkeypatch.setattr(os, "stat", late)
    with says("x", "not a regular file"):
        files.read_text(folder / "x", 100)


def test_sizes_are_found_before_reading(folder: Path) -> None:
    with (folder / "x").open("wb") as file:
        file.truncate(10 << 30)
    with says("x", "10,737,418,240 bytes", "at most 1,000"):
        files.read_text(folder / "x", 1000)
    (folder / "x").write_bytes(b"1" * 1000)
    assert files.read_text(folder / "x", 1000) == "1" * 1000


def test_text_is_utf8(folder: Path) -> None:
    (folder / "x").write_bytes(b"a\xffb")
    with says("x", "not UTF-8", "byte 1", "0xff"):
        files.read_text(folder / "x", 100)
    (folder / "x").write_bytes(b"\xc3\xa4")
    assert files.read_text(folder / "x", 100) == "ä"
    with says("y", "no such file"):
        files.read_text(folder / "y", 100)
    with says("no"):
        files.read_text(folder / "\0", 100)


def test_json_is_not_read_beyond_its_kind(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(10 << 30)
    with says("config.json", "10,737,418,240 bytes", f"at most {files.MAX_JSON:,}"):
        files.read_json(folder / "config.json")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with says("config.json", "not a regular file"):
        files.read_json(folder / "config.json")


def test_prompts_come_from_files_and_from_what_shells_make_for_commands(folder: Path) -> None:
    (folder / "x").write_bytes(b"\xef\xbb\xbf4 boards\r\n")
    assert options.read_file(folder / "x") == "4 boards"
    reading, writing = os.pipe()
    os.write(writing, b"4 boards\n")
    os.close(writing)
    assert options.read_file(Path(f"/dev/fd/{reading}")) == "4 boards"  # what `<(command)` is
    os.close(reading)
    os.mkfifo(folder / "pipe")
    for name, kind in (("pipe", "a pipe"), (".", "a folder")):
        with says(kind):
            options.read_file(folder / name)
    with (folder / "huge").open("wb") as file:
        file.truncate(10 << 30)
    with says("huge", "at most"):
        options.read_file(folder / "huge")


def test_lines_are_added_to_the_users_own_files_only(folder: Path, canary: Path) -> None:
    for line in (b"one\n", b"two\n"):
        files.append_bytes(folder / "log", line)
    assert (folder / "log").read_bytes() == b"one\ntwo\n"
    for kind, trap in IN_THE_WAY.items():
        trap(folder / f"x{kind}", canary)
        with says(kind.strip()):
            files.append_bytes(folder / f"x{kind}", b"three\n")
    os.link(canary, folder / "other")
    with says("another name"):
        files.append_bytes(folder / "other", b"three\n")
    assert canary.read_bytes() == CANARY and os.listdir(canary.parent) == ["canary"]


def test_examples_write_through_no_link(folder: Path, canary: Path) -> None:
    write = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "sudoku" / "nano.py"))["write_folder"]
    write(folder, {"a": 1})
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in made:
        (folder / name).unlink()
        (folder / name).symlink_to(canary)
        with says(name, "is a link"):
            write(folder, {"a": 2})
        (folder / name).unlink()
    assert canary.read_bytes() == CANARY
    packaged = Path(resolve("nano"))
    assert {name for name, data in made.items() if data != (packaged / name).read_bytes()} == {"config.json"}
