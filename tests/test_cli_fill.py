"""`dgemma fill` and `dgemma edit`: where text comes from, what is written byte for byte, files replaced whole."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main
from dgemma.cli.edit import write_over
from dgemma.cli.exact import read_exact
from said import says
from spellings import checkpoint

BOARD = ".3.1 .2.. .... ...4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("cli_fill"), "gemma")


def run(*args: str | Path, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, args)], input=stdin, prog_name="dgemma")


def at(model: Path) -> list[str]:
    return ["--model", str(model), "--backend", "torch", "--steps", "2"]


def one_line(done: Result, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == "" and done.stderr.startswith("dgemma: error: ") and done.stderr.count("\n") == 1, done.output
    assert all(word in done.stderr for word in words), done.stderr


# ---- fill ------------------------------------------------------------------------------------------------


def test_a_board_with_its_givens_held() -> None:
    done = run("fill", "--prompt", BOARD, "<fill:4>\n1243\n<fill:4>\n2134", "--backend", "torch")
    assert done.exit_code == 0 and done.stdout == "4321\n1243\n3412\n2134"
    assert "wrote 8" in done.stderr


@pytest.mark.parametrize("text", ["a\r\n<fill:2>\r\nb\r\n", "\ufeffx<fill:3>", "é\0<fill:1>\t\n\n", "<fill:2>"])
def test_bytes_are_kept(model: Path, tmp_path: Path, text: str) -> None:
    data = text.encode()
    (tmp_path / "file").write_bytes(data)
    left, _, right = data.partition(b"<fill:")
    right = right[2:]
    for done in (
        run("fill", "-f", tmp_path / "file", *at(model)),
        run("fill", *at(model), stdin=data),
        run("fill", "-", "-q", *at(model), stdin=data),
    ):
        assert done.exit_code == 0, done.output
        assert done.stdout_bytes.startswith(left) and done.stdout_bytes.endswith(right)
        assert len(done.stdout_bytes) > len(left) + len(right)


def test_another_encoding_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("\ufeffaé<fill:2>b".encode("utf-16-le"))
    done = run("fill", "-f", tmp_path / "file", *at(model))
    assert done.stdout_bytes.startswith("\ufeffaé".encode("utf-16-le"))
    assert done.stdout_bytes.endswith("b".encode("utf-16-le"))


def test_a_prefix_and_a_suffix_stand_as_they_are(model: Path, tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"<fill>\r\n")
    (tmp_path / "right").write_bytes(b" <fill:3>\n")
    both = ["--prefix-file", tmp_path / "left", "--suffix-file", tmp_path / "right"]
    done = run("fill", *both, *at(model))
    assert done.stdout_bytes.startswith(b"<fill>\r\n") and done.stdout_bytes.endswith(b" <fill:3>\n")
    done = run("fill", "--suffix-file", "-", *at(model), stdin=b"tail")
    assert done.stdout.endswith("tail")


def test_candidates_with_their_scores(model: Path) -> None:
    done = run("fill", "ab <fill:3> cd", "-n", "3", "--json", "-q", *at(model))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3 and done.stderr == ""
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert all(one["text"].startswith("ab ") and len(one["holes"][0]["token_ids"]) == 3 for one in found)
    done = run("fill", "ab <fill:3> cd", "--n", "3", *at(model))
    assert done.stdout == found[0]["text"]
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [f"{one['score']:.3f}" for one in found]
    done = run("fill", "ab <fill> cd", "--lengths", "2-3,5", "-n", "1", "--json", *at(model))
    assert len(json.loads(done.stdout)["holes"][0]["token_ids"]) in (2, 3, 5)


def test_fills_are_recorded(model: Path, tmp_path: Path) -> None:
    done = run("fill", "ab <fill:3> cd", "--record", tmp_path / "record", *at(model))
    assert done.exit_code == 0
    assert run("replay", tmp_path / "record", "--speed", "100").exit_code == 0


def test_what_fill_refuses_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"ab\xff<fill>")
    one_line(run("fill", "-f", tmp_path / "bad"), 1, "bad: not UTF-8 (byte 2 is 0xff)")
    one_line(run("fill", stdin=b"\xff"), 1, "stdin: not UTF-8 (byte 0")
    one_line(run("fill", "-f", tmp_path / "none"), 1, "no such file")
    one_line(run("fill", "no hole", *at(model)), 1, "no hole", "<fill>")
    one_line(run("fill", "<fill>", "-f", "x"), 2, "one of them")
    one_line(run("fill", "--prefix-file", "-", "--suffix-file", "-"), 2, "both be stdin")
    one_line(run("fill", "<fill>", "--system", "x"), 2, "--prompt")
    one_line(run("fill", "<fill>", "--lengths", "0-3"), 2, "below 1")
    one_line(run("fill", "<fill>", "--lengths", "3-x"), 2, "form")
    one_line(run("fill", "<fill>", "--marker", "x", *at(model)), 1, "marker")
    one_line(run("fill", "<fill:5000>", *at(model)), 1, "context is 4,096")


# ---- edit ------------------------------------------------------------------------------------------------

TEXT = "one\ntwo\nthree\nfour\n"


def test_an_edit_is_shown_and_nothing_written(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text(TEXT)
    done = run("edit", file, "--lines", "2:3", "-i", "Shorter.", *at(model))
    assert done.exit_code == 0 and done.stdout.startswith("--- a/file.txt\n+++ b/file.txt\n@@ ")
    assert file.read_text() == TEXT
    checked = run("edit", file, "--lines", "2:3", "-i", "Shorter.", "--check", *at(model))
    assert checked.exit_code == 1 and checked.stdout == done.stdout
    piped = run("edit", "-", "--lines", "2:3", "-i", "Shorter.", *at(model), stdin=TEXT)
    assert piped.stdout == done.stdout.replace("file.txt", "stdin")


def test_strength_0_changes_nothing(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text(TEXT)
    before = file.stat()
    for more in (["--check"], ["--write"], []):
        done = run("edit", file, "--lines", "1:4", "--strength", "0", *more, *at(model))
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert file.stat() == before


def test_write_keeps_links_permissions_and_bytes(model: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "file.txt", tmp_path / "link"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    file.chmod(0o640)
    link.symlink_to("file.txt")
    shown = run("edit", link, "--lines", "2", "-i", "x", *at(model))
    done = run("edit", link, "--lines", "2", "-i", "x", "--write", *at(model))
    assert done.exit_code == 0 and done.stdout == shown.stdout != ""
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640
    data = file.read_bytes()
    assert data.startswith(b"\xef\xbb\xbfone\r\n") and data.endswith(b"\r\nthree\r\nfour\r\n")
    assert data.count(b"\n") == data.count(b"\r\n") and data != b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file.txt", "link"]


def test_a_file_that_was_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    source = read_exact(file)
    file.write_bytes(b"another's")
    with says("file", "changed while", "nothing was written"):
        write_over(file, source, b"new")
    assert file.read_bytes() == b"another's" and len(list(tmp_path.iterdir())) == 1
    file.unlink()
    with says("no such file"):
        write_over(file, source, b"new")


KILLED = """
import sys
from pathlib import Path
from dgemma.cli.edit import write_over
from dgemma.cli.exact import read_exact
file = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_over(file, read_exact(file), bytes([letter]) * 3_000_000)
"""


def test_killed_at_any_moment_it_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    draw = random.Random(0)
    for _ in range(6):
        file.write_bytes(b"b" * 3_000_000)
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(draw.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        data = file.read_bytes()
        assert len(data) == 3_000_000 and data in (b"a" * 3_000_000, b"b" * 3_000_000)


def test_what_edit_refuses_is_one_line(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(TEXT)
    one_line(run("edit", file), 1, "one of them")
    one_line(run("edit", file, "--lines", "3:9"), 1, "lines 1 to 4")
    one_line(run("edit", file, "--lines", "x"), 2, "10:24")
    one_line(run("edit", file, "--lines", "1", "--write", "--check"), 2, "--check")
    one_line(run("edit", "-", "--lines", "1", "--write"), 2, "stdin")
    one_line(run("edit", tmp_path / "none", "--lines", "1"), 1, "no such file")
    one_line(run("edit", file, "--lines", "1", "--strength", "2"), 2, "strength")
    file.write_bytes(b"a\xff")
    one_line(run("edit", file, "--lines", "1"), 1, "not UTF-8 (byte 1 is 0xff)")
    if os.geteuid():
        tmp_path.chmod(0o500)
        one_line(run("edit", file, "--lines", "1", "--write"), 1, "nothing may be written there")
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("command", ["fill 'a<fill:2>b'", "edit FILE --lines 2 -i x"])
def test_an_unwritable_stdout_is_said(model: Path, tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.write_text(TEXT)
    line = f"{sys.executable} -m dgemma {command.replace('FILE', str(file))} -m {model} --backend numpy -q >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("dgemma: error: stdout: No space left"), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_commands_are_the_methods(model: Path) -> None:
    loaded = dgemma.load(model, backend="torch")
    done = run("fill", "ab <fill:3> cd <fill>", "--seed", "4", *at(model))
    assert done.stdout == loaded.fill("ab <fill:3> cd <fill>", seed=4, steps=2).text


@pytest.mark.parametrize(
    "name, args, wanted", [("sudoku", [], "354216\n216543\n"), ("infill", ["--length", "5"], "def median")]
)
def test_the_examples_run(name: str, args: list[str], wanted: str) -> None:
    path = Path(__file__).parents[1] / "examples" / "canvas" / f"{name}.py"
    found = runpy.run_path(str(path))
    done = CliRunner().invoke(found["main"], args)
    assert done.exit_code == 0 and done.stdout.startswith(wanted), done.output
