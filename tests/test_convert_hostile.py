"""Conversion where others can write: traps under every name that it uses, damaged work, targets that cannot be."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.folder import Folder
from dgemma.convert import convert
from dgemma.convert import converter as engine
from dgemma.convert.partial import digest
from dgemma.core.errors import DgemmaError
from published import MANIFEST, SHARD, floats, hashes, left
from said import check_line, says
from test_files import CANARY, IN_THE_WAY

INDEX = "model.safetensors.index.json"
JOURNAL, PLAN, LOCK = (f".dgemma/{name}" for name in ("journal.jsonl", "plan.json", "lock"))
NAMES = (SHARD, "config.json", INDEX, "tokenizer.json", MANIFEST, JOURNAL, PLAN, LOCK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A source; `whole`, converted; and `half`, all of whose weights are converted, but which is not moved."""
    place = tmp_path_factory.mktemp("made")
    folder = floats(place)
    convert(folder, place / "whole", workers=1)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_complete", fails)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, place / "half", workers=1)
    return place


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of both; what is half done would become `out`."""
    for old, new in (("source", "source"), ("half.partial", "out.partial")):
        shutil.copytree(made / old, tmp_path / new)
        for path in (made / old).iterdir():
            shutil.copystat(path, tmp_path / new / path.name)
    return tmp_path


def again(folder: Path, **options: Any) -> None:
    convert(folder / "source", folder / "out", workers=1, **options)


# ---- Traps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard link", *IN_THE_WAY])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_through_what_is_found_under_a_name(made: Path, folder: Path, name: str, kind: str) -> None:
    canary = folder / "elsewhere" / "canary"
    canary.parent.mkdir()
    canary.write_bytes(CANARY)
    trap = folder / "out.partial" / name
    trap.unlink(missing_ok=True)
    if kind == "hard link":
        os.link(canary, trap)
    else:
        IN_THE_WAY[kind](trap, canary)
    try:
        again(folder)
    except DgemmaError as error:
        check_line(error, trap.name)
        assert "its making" not in str(error)
        assert not (folder / "out").exists()
    else:
        assert hashes(folder / "out") == hashes(made / "whole") and left(folder) == {"out", "elsewhere"}
    assert canary.read_bytes() == CANARY and os.listdir(canary.parent) == ["canary"]


@pytest.mark.parametrize("name", ["out.partial", "out.partial/.dgemma", "out"])
def test_a_link_to_a_folder_is_no_folder_of_its_own(folder: Path, name: str) -> None:
    theirs = folder / "theirs"
    (folder / "out.partial").rename(theirs) if name == "out.partial" else theirs.mkdir()
    if name.endswith(".dgemma"):
        shutil.rmtree(folder / name)
    (folder / name).symlink_to(theirs)
    before = sorted(theirs.rglob("*"))
    for force in (False, True):
        with says("is a link" if name == "out" else "in the way"):
            again(folder, force=force)
    assert sorted(theirs.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", ".dgemma", SHARD, JOURNAL, PLAN, LOCK])
def test_what_another_user_can_change_is_not_taken_up(folder: Path, name: str) -> None:
    os.chown(folder / "out.partial" / name, 12345, -1)
    with says("belongs to another user", "remove it"):
        again(folder)
    assert left(folder) == {"out.partial"}


def test_a_file_system_without_owners_is_used(made: Path, folder: Path, monkeypatch: Any) -> None:
    """Every file there has one owner, who is not this process's user."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    again(folder)
    assert hashes(folder / "out") == hashes(made / "whole")


def test_a_folder_of_the_user_that_has_the_name_of_what_was_replaced(folder: Path) -> None:
    shutil.copytree(folder / "source", folder / "out.replaced")
    shutil.copytree(folder / "source", folder / "out")
    again(folder, force=True)
    assert (folder / "out.replaced").exists()
    shutil.copytree(folder / "source", folder / "theirs")
    for name in ("theirs", "../theirs", str(folder / "theirs"), "dgemma-0.replaced", "x" * 1000):
        (folder / "out" / ".dgemma").mkdir()
        (folder / "out" / ".dgemma" / "replaced").write_text(name)
        again(folder)
        assert not (folder / "out" / ".dgemma").exists()
    assert (folder / "theirs" / "config.json").exists()
    assert left(folder) == {"out", "out.replaced", "theirs"}


@pytest.mark.parametrize("moved", [1, 2])
def test_a_kill_between_the_two_moves_loses_nothing(made: Path, folder: Path, monkeypatch: Any, moved: int) -> None:
    shutil.copytree(folder / "source", folder / "out")
    rename, count = Path.rename, 0

    def dies(self: Path, other: Path) -> Any:
        nonlocal count
        count += 1
        if count == moved:
            raise KeyboardInterrupt
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            again(folder, force=True)
    assert len(list(folder.glob("*/model.safetensors"))) == 2  # the source, and what is to be replaced
    again(folder, force=True)
    assert hashes(folder / "out") == hashes(made / "whole") and left(folder) == {"out"}


# ---- Damaged work ---------------------------------------------------------------------------------------------


def test_rows_that_changed_since_are_written_again(made: Path, folder: Path) -> None:
    shard = folder / "out.partial" / SHARD
    data = bytearray(shard.read_bytes())
    start = min(entry.start for entry in Checkpoint.open(made / "whole").files[0].entries.values())
    draw = random.Random(0)
    for _ in range(20):
        data[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
    shard.write_bytes(data)
    again(folder)
    assert hashes(folder / "out") == hashes(made / "whole")


@pytest.mark.parametrize("change", ["header", "shorter", "longer", "absent"])
def test_a_file_that_is_another_is_made_anew(made: Path, folder: Path, change: str) -> None:
    shard = folder / "out.partial" / SHARD
    data = shard.read_bytes()
    shard.write_bytes({"header": b"!" + data[1:], "shorter": data[:-1], "longer": data + b"!", "absent": b""}[change])
    if change == "absent":
        shard.unlink()
    again(folder)
    assert hashes(folder / "out") == hashes(made / "whole")


def test_a_damaged_journal_is_taken_up_as_far_as_it_is_sound(made: Path, folder: Path, monkeypatch: Any) -> None:
    journal = folder / "out.partial" / JOURNAL
    sound = journal.read_bytes()
    lines = sound.splitlines(keepends=True)
    draw = random.Random(1)
    flipped = bytearray(sound)
    for _ in range(10):
        flipped[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
    other = [line.replace(b'["block", 3,', b'["block", 99999,').replace(b", 0, ", b", 7, ") for line in lines]
    for data in (
        b"", b"\n\n", sound[: len(sound) // 2], sound[100:], bytes(flipped), b"\xff\xfe\0" * 999, b"[" * 99_999 + b"\n",
        b"\n".join([b'["block", 0, 0, "nan", "x", ""]'] * 9), b"".join(other), b"null\n" + sound, sound + sound,
        b"".join(draw.sample(lines, len(lines))), b"{}\n" + b"".join(lines[::2]), b"0" * 32 + b" [1]\n",
    ):  # fmt: skip
        before = {path: path.read_bytes() for path in (folder / "out.partial").rglob("*") if path.is_file()}
        journal.write_bytes(data)
        again(folder)
        assert hashes(folder / "out") == hashes(made / "whole")
        shutil.rmtree(folder / "out")
        (folder / "out.partial" / ".dgemma").mkdir(parents=True)
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.parametrize(
    "entry",
    [b"[", b"[" * 99_999, b'"\xff"', b"null", b"{}", b'["factor",0,"zz"]', b'["block",0,0,"x","y",""]',
     b'["block",0,0,"0x1p9999","0x1p0","0"]'],
    ids=range(8),
)  # fmt: skip
def test_a_line_with_a_sound_hash_and_no_meaning_is_another_versions(folder: Path, entry: bytes) -> None:
    hashed = digest([(folder / "out.partial" / PLAN).read_bytes(), entry])
    with (folder / "out.partial" / JOURNAL).open("ab") as file:
        file.write(hashed.encode() + b" " + entry + b"\n")
    with says("out.partial", "begun by another version of dgemma; remove it"):
        again(folder)


def test_a_changed_factor_is_found_again(folder: Path, monkeypatch: Any) -> None:
    """nvfp4's factor of a weight is in the journal: nothing else would show that it is another."""
    source, out = folder / "source", folder / "four"
    convert(source, folder / "whole", "nvfp4", workers=1)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_complete", fails)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, "nvfp4", workers=1)
    journal = folder / "four.partial" / JOURNAL
    kept = [line for line in journal.read_text().splitlines() if "factor" in line]
    assert kept
    journal.write_text("".join(line.replace("0x1.", "0x1.1") + "\n" for line in kept))
    convert(source, out, "nvfp4", workers=1)
    assert hashes(out) == hashes(folder / "whole")


def test_a_journal_that_is_too_long_is_not_read(folder: Path) -> None:
    with (folder / "out.partial" / JOURNAL).open("ab") as file:
        file.truncate(1 << 40)
    with says("journal.jsonl", "1,099,511,627,776 bytes", "remove it"):
        again(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"source": 1}'])
def test_a_damaged_plan_is_other_work(folder: Path, made: Path, text: bytes) -> None:
    (folder / "out.partial" / PLAN).write_bytes(text)
    with says("out.partial", "--force"):
        again(folder)
    again(folder, force=True)
    assert hashes(folder / "out") == hashes(made / "whole")


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"files": [], "plan": 0}', b"link", b"pipe"])
def test_a_folder_with_a_damaged_manifest_is_not_taken_for_finished(folder: Path, made: Path, text: bytes) -> None:
    shutil.copytree(made / "whole", folder / "out")
    manifest = folder / "out" / MANIFEST
    manifest.unlink()
    if text == b"pipe":
        os.mkfifo(manifest)
    elif text == b"link":
        manifest.symlink_to("/dev/zero")
    else:
        manifest.write_bytes(text)
    with says("out: exists"):
        again(folder)


# ---- Targets that cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["x" * 248, "x" * 256, "ä" * 124, "a/" * 3000 + "x", "\0", "\ud800", "~nobody-of-that-name/x", "", ".", ".."],
    ids=["partial", "long", "wide", "deep", "nul", "half", "home", "empty", "dot", "dots"],
)
def test_names_that_no_folder_can_have_are_found_before_the_work(folder: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(engine, "_make", None)
    out: Any = name if name.startswith("~") or not name.strip(".") else folder / name
    with says():
        convert(folder / "source", out)


def test_a_name_of_the_greatest_length(folder: Path, made: Path) -> None:
    convert(folder / "source", folder / ("x" * 247), workers=1)
    assert hashes(folder / ("x" * 247)) == hashes(made / "whole")


def test_targets_that_cannot_be_written_are_found_before_the_work(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "_make", None)
    (folder / "dangling").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    for name in ("dangling", "pipe", "dangling/out", "source", "source/out", "."):
        with says():
            convert(folder / "source", folder / name, force=True)
    (folder / "source").rename(folder / "x.partial")
    with says("may not be the source"):
        convert(folder / "x.partial", folder / "x", force=True)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with says(folder.name, "nothing may be written there"):
        convert(folder / "x.partial", folder / "out")
    assert not (folder / "nothing").exists()


# ---- Names and sources ----------------------------------------------------------------------------------------


def test_names_that_are_not_text(folder: Path, made: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe")
    (folder / "source" / f"{odd}.json").write_text("{}")
    (folder / "source").rename(folder / odd)
    report = convert(folder / odd, folder / f"out{odd}", workers=1, verify=True)
    assert hashes(report.path).keys() == hashes(made / "whole").keys()
    with says("no model"):
        convert(folder / odd / odd, folder / "other")
    with says("??"):  # how a name that is not UTF-8 is shown
        convert(folder / f"out{odd}", folder / f"{odd}2", rules=folder / f"{odd}.toml")


def test_half_a_character_in_the_config(folder: Path) -> None:
    config = json.loads((folder / "source" / "config.json").read_text())
    (folder / "source" / "config.json").write_text(json.dumps(config | {"name_or_path": "\ud800"}))
    convert(folder / "source", folder / "new", workers=1, verify=True)
    assert json.loads((folder / "new" / "config.json").read_text())["name_or_path"] == "\ud800"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "NOTICE"])
@pytest.mark.parametrize("kind", ["link", "pipe", "huge"])
def test_settings_that_are_traps_are_refused_before_the_work_or_left_out(
    folder: Path, monkeypatch: Any, name: str, kind: str
) -> None:
    monkeypatch.setattr(engine, "_fill", None)
    path = folder / "source" / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to("/proc/self/environ")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(10 << 30)
    with suppress(TypeError), says(name):  # left out, and then _fill is called
        convert(folder / "source", folder / "new", workers=1)


def test_files_may_not_grow_as_they_must(folder: Path, made: Path) -> None:
    """A limit on the size of files, as of a shared machine: one line, and it goes on without the limit."""
    code = f"""
import resource, sys
from dgemma.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    convert({str(folder / "source")!r}, {str(folder / "new")!r}, workers=1)
except ValueError as error:
    print(type(error).__name__, error)
"""
    for limit in ("100", "50000"):
        said = subprocess.run([sys.executable, "-c", code, limit], capture_output=True, text=True, check=True).stdout
        assert said.startswith("DgemmaError") and "larger than a file may be" in said and said.count("\n") == 1
        assert not (folder / "new").exists()
    convert(folder / "source", folder / "new", workers=1)
    assert hashes(folder / "new") == hashes(made / "whole")


def test_another_folder_takes_the_place_while_it_works(folder: Path, monkeypatch: Any) -> None:
    """What is open stays what is written to."""
    theirs = folder / "theirs"
    theirs.mkdir()
    whole = engine.Partial.begin

    def exchanged(self: Any, shards: Any) -> None:
        whole(self, shards)
        (folder / "out.partial").rename(folder / "moved")
        (folder / "out.partial").symlink_to(theirs)

    monkeypatch.setattr(engine.Partial, "begin", exchanged)
    with says():
        again(folder)
    assert os.listdir(theirs) == [] and not os.path.lexists(folder / "out")


def test_a_link_takes_the_place_of_a_folder_just_made(folder: Path, monkeypatch: Any) -> None:
    (folder / "theirs").mkdir()
    whole = Path.mkdir

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        whole(self, *args, **options)
        if self.name == "new.partial":
            self.rmdir()
            self.symlink_to(folder / "theirs")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with says("new.partial"):
        convert(folder / "source", folder / "new")
    assert os.listdir(folder / "theirs") == []


def test_an_open_folder_is_known_by_more_than_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with Folder(tmp_path / "a") as one:
        before = one.identity
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        assert one.identity == before and Folder(tmp_path / "a").identity != before
        with pytest.raises(FileNotFoundError, match=r"a/x"):
            one.open("x", os.O_RDONLY)
