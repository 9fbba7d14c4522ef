"""Where an export goes: nothing of the user's is written over, followed or lost, and nothing is left half made."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.export import exporter
from dgemma.export.manifest import NAME
from said import says
from tiny import edit_json, shard, tiny_checkpoint

PRECIOUS = b"the user's own\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("target"))


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def tokens(folder: Path) -> tuple[int, ...]:
    return dgemma.load(folder, backend="onnx").generate(list(range(20, 30)), 20, eos=()).token_ids


# ---- What is in the way ---------------------------------------------------------------------------------------


def test_names_that_could_be_guessed_are_not_written_to(source: Path, precious: Path) -> None:
    for name in ("encode.onnx.partial", "denoise.onnx.partial", f"{NAME}.partial", "model.safetensors.partial"):
        (source / name).symlink_to(precious)
    dgemma.export(source)
    dgemma.export(source, source.parent / "alone", standalone=True)
    assert precious.read_bytes() == PRECIOUS and tokens(source) == tokens(source.parent / "alone")


def link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def dangling(path: Path, precious: Path) -> None:
    path.symlink_to(precious.with_name("not there"))


def pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, _: Path) -> None:
    path.mkdir()
    (path / "kept").write_bytes(PRECIOUS)


def a_file(path: Path, _: Path) -> None:
    path.write_bytes(PRECIOUS)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["encode.onnx", "denoise.onnx", NAME])
@pytest.mark.parametrize("put", [link, dangling, pipe, a_folder, a_file])
def test_what_no_export_left_stays(source: Path, precious: Path, put: Any, name: str, force: bool) -> None:
    put(source / name, precious)
    before = contents(source.parent)
    with says(name):
        dgemma.export(source, force=force)
    assert contents(source.parent) == before


@pytest.mark.parametrize("put", [link, dangling, a_file])
def test_a_name_that_is_not_written_may_be_the_users(source: Path, precious: Path, put: Any) -> None:
    dgemma.export(source)
    put(source / "unified.onnx", precious)
    before = contents(source)["unified.onnx"]
    with says("unified.onnx"):
        dgemma.export(source, force=True)
    assert contents(source)["unified.onnx"] == before and precious.read_bytes() == PRECIOUS


def test_force_replaces_what_an_export_left(source: Path) -> None:
    dgemma.export(source, unified=True)
    edit_json(source / NAME, version=1, bound=None, files=None)  # as an earlier version wrote it
    dgemma.export(source, force=True)
    assert {path.name for path in source.glob("*.onnx")} == {"encode.onnx", "denoise.onnx"}
    want = tokens(source)
    (source / "encode.onnx").write_bytes((source / "encode.onnx").read_bytes()[:500])
    (source / NAME).unlink()  # which leaves graphs that know whose they are
    with says("is not empty"):
        dgemma.export(source)
    dgemma.export(source, force=True)
    assert tokens(source) == want


@pytest.mark.parametrize("options", [{}, dict(standalone=True)])
def test_force_replaces_a_whole_export(source: Path, options: dict[str, Any]) -> None:
    out = source.parent / "out"
    dgemma.export(source, out, **options)
    want = tokens(out)
    with says("is not empty"):
        dgemma.export(source, out, **options)
    shard(source)
    (out / "notes").write_bytes(PRECIOUS)  # in nobody's way
    dgemma.export(source, out, force=True, **options)
    assert tokens(out) == want
    assert len(list(out.glob("*.safetensors"))) == (1 if options else 3)
    assert (out / "notes").read_bytes() == PRECIOUS
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def saved_over(out: Path) -> None:
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(data[:-4] + b"tune")


def moved_over(out: Path) -> None:
    saved_over(out)
    os.utime(out / "model.safetensors", ns=(10**18, 10**18))


def edited(out: Path) -> None:
    (out / "config.json").write_text((out / "config.json").read_text() + " ")


def in_the_way(out: Path) -> None:
    """A file of the user's by a name that this export brings, and the one before did not."""
    (out.parent / "source" / "notes.json").write_text("{}")
    (out / "notes.json").write_bytes(PRECIOUS)


def linked(out: Path) -> None:
    (out / "tokenizer.json").rename(out.parent / "elsewhere")
    (out / "tokenizer.json").symlink_to(out.parent / "elsewhere")


def no_manifest(out: Path) -> None:
    (out / NAME).unlink()


def earlier(out: Path) -> None:
    edit_json(out / NAME, version=1, files=None)


CHANGES = (saved_over, moved_over, edited, in_the_way, linked, no_manifest, earlier)


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_force_keeps_what_has_become_the_users(source: Path, change: Callable[[Path], None], standalone: bool) -> None:
    out = source.parent / "out"
    dgemma.export(source, out, standalone=standalone)
    change(out)
    before = contents(source.parent)
    with says(f"/{out.name}"):
        dgemma.export(source, out, standalone=standalone, force=True)
    assert contents(source.parent) == before


def test_another_checkpoint_is_not_taken_for_an_export(source: Path) -> None:
    other = tiny_checkpoint(source.parent, name="other", seed=1)
    dgemma.export(other)
    before = contents(source.parent)
    for options in ({}, dict(standalone=True)):
        with says("other"):
            dgemma.export(source, other, force=True, **options)
    assert contents(source.parent) == before


# ---- The folder's name ----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_is_found_before_the_work(
    source: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(exporter, "_bring", work)
    monkeypatch.setattr(exporter, "_write", work)
    root = source.parent
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "empty")
    (root / "dangling").symlink_to(root / "nothing")
    (root / "circle").symlink_to(root / "circle")
    os.mkfifo(root / "pipe")
    before = contents(root)
    for name, words in {
        "link": "is a link", "link/": "is a link", "dangling": "is a link", "circle": "is a link",
        "pipe": "is not a folder",
        "precious": "is a file", "precious/sub": "Not a directory", "circle/sub": "levels of symbolic links",
        "source/sub": "lies inside the source", "x" * 256: "File name too long",
        "x/" * 3000: "File name too long", "nul\0": "not a name", ".": "is not empty",
    }.items():  # fmt: skip
        for force in (False, True):
            with says(words):
                dgemma.export(source, f"{root}/{name}", force=force)
    with says("expected a path"):
        dgemma.export(source, 7)  # type: ignore[arg-type]
    assert contents(root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(source: Path) -> None:
    source.chmod(0o500)
    try:
        with says("Permission denied"):
            dgemma.export(source)
    finally:
        source.chmod(0o700)


def test_the_package_is_left_alone(tmp_path: Path) -> None:
    package = Path(dgemma.__file__).parent / "models" / "nano"
    before = contents(package)
    for arguments in (("nano",), (package,), ("nano", package), ("nano", package / "sub"), (package, package)):
        with says("is a part of the package, whose folder is left alone; give an out"):
            dgemma.export(*arguments, force=True)
    assert contents(package) == before


# ---- What is copied -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["/proc/self/environ", "../precious", "/dev/zero", "nowhere"])
@pytest.mark.parametrize("name", ["notes.json", "chat_template.jinja", "README.jinja"])
def test_links_out_of_the_folder_are_not_copied(source: Path, precious: Path, name: str, to: str) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(to)
    out = source.parent / "out"
    with says(name):
        dgemma.export(source, out)
    assert not out.exists()


def test_links_inside_the_folder_are_copied_as_files(source: Path) -> None:
    (source / "tokenizer.json").rename(source / "kept")
    (source / "tokenizer.json").symlink_to("kept")
    (source / "folder.json").mkdir()
    out = source.parent / "out"
    os.mkfifo(source / "pipe.json")
    with says("pipe.json: not a regular file"):
        dgemma.export(source, out)
    (source / "pipe.json").unlink()
    dgemma.export(source, out)
    assert (out / "tokenizer.json").read_bytes() == (source / "kept").read_bytes()
    assert not (out / "tokenizer.json").is_symlink() and not (out / "folder.json").exists()


# ---- What comes between ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("standalone", [False, True])
def test_a_full_disk_and_an_interrupt_leave_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, standalone: bool
) -> None:
    out = source.parent / "out"
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(exporter, "left", fail)  # with all but the manifest written
        for place in (None, out) if not standalone else (out,):
            before = contents(source.parent)
            if isinstance(error, OSError):
                with says("the disk is full"):
                    dgemma.export(source, place, standalone=standalone)
            else:
                with pytest.raises(KeyboardInterrupt):
                    dgemma.export(source, place, standalone=standalone)
            assert contents(source.parent) == before


KILLED = """
import os, signal, sys
import dgemma
from dgemma.checkpoints.folder import Folder
rename, turns = Folder.rename, [int(sys.argv[3])]
def killed(self, old, new):
    rename(self, old, new)
    turns[0] -= 1
    if turns[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
Folder.rename = killed
dgemma.export(sys.argv[1], sys.argv[2] or None, fp16=True, force=True)
"""


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("out", ["", "out"])
def test_a_kill_in_the_middle_is_noticed_and_mended(source: Path, out: str, turn: int) -> None:
    folder = source.parent / out if out else source
    dgemma.export(source, folder)
    want = tokens(folder)
    arguments = [str(source), str(folder) if out else "", str(turn)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    with pytest.raises(dgemma.DgemmaError):
        dgemma.load(folder, backend="onnx", dtype="float16")
    dgemma.export(source, folder, force=True)
    assert tokens(folder) == want


def test_what_a_kill_left_is_not_in_the_way(source: Path) -> None:
    rest = source.parent / "out" / ".dgemma-0123456789abcdef.partial"
    rest.mkdir(parents=True)
    dgemma.export(source, rest.parent)
    assert tokens(rest.parent) and rest.is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("options", ["standalone=True", ""])
def test_a_file_that_may_not_grow(source: Path, options: str) -> None:
    """A limit is a full disk that any user can make; the names it says are those that were asked for."""
    code = (
        "import resource, sys, dgemma; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"try: dgemma.export(sys.argv[1], sys.argv[2], {options})\n"
        "except dgemma.DgemmaError as error: print(error)"
    )
    out = source.parent / "out"
    run = subprocess.run([sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("\n") == 1, run.stderr
    assert "/out" in run.stdout and ".partial" not in run.stdout and not out.exists()


def test_two_exports_at_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, bring = [], exporter._write

    def meanwhile(*arguments: Any) -> Any:
        if not seen:
            seen.append(True)
            for options in ({}, dict(force=True)):
                with says("another export is at work here; wait for it"):
                    dgemma.export(source, **options)
        return bring(*arguments)

    monkeypatch.setattr(exporter, "_write", meanwhile)
    dgemma.export(source)
    assert seen and tokens(source)


def test_what_has_come_meanwhile_is_not_written_over(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporter._write

    def meanwhile(*arguments: Any) -> Any:
        made = write(*arguments)
        (source / "denoise.onnx").write_bytes(PRECIOUS)
        return made

    monkeypatch.setattr(exporter, "_write", meanwhile)
    with says("denoise.onnx"):
        dgemma.export(source)
    assert (source / "denoise.onnx").read_bytes() == PRECIOUS and not (source / NAME).exists()
