"""The process around a command: streams that are closed, full or left by their reader, and signals at bad moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import tiny_checkpoint

PATIENCE = 120.0
ENDING = [
    (signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal went away"),
]  # fmt: skip
FULL = Path("/dev/full")
SAYS = "dgemma: error: stdout"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("process"), canvas_length=16)


def shell(line: str, tiny: Path) -> tuple[int, str, str]:
    """Run a line of bash in which DGEMMA and MODEL stand for a command → its exit code, stdout, stderr."""
    line = line.replace("DGEMMA", f"{sys.executable} -m dgemma").replace("MODEL", f"-m {tiny} --backend numpy")
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=PATIENCE,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


COMMANDS = ["--help", "generate x MODEL", "generate x MODEL --json", "inspect nano", "chat MODEL <<<x"]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_stdout_is_one_line(tiny: Path, command: str) -> None:
    code, _, said = shell(f"DGEMMA {command} >/dev/full", tiny)
    lines = [line for line in said.splitlines() if not line.startswith("prompt ")]
    assert (code, len(lines)) == (1, 1) and lines[0].startswith(f"{SAYS}: No space left"), said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stdout_is_refused_before_the_work(tiny: Path, command: str) -> None:
    code, _, said = shell(f"DGEMMA {command} >&-", tiny)
    assert code == 1 and said.startswith(f"{SAYS} is closed") and said.count("\n") == 1, said


@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full", "2> >(:)"])
def test_an_unwritable_stderr_changes_nothing(tiny: Path, how: str) -> None:
    """Figures never get onto stdout."""
    want = shell("DGEMMA generate x MODEL", tiny)[1]
    assert want and shell(f"DGEMMA generate x MODEL {how}", tiny)[:2] == (0, want)
    assert shell(f"DGEMMA generate x -m / {how}", tiny)[:2] == (1, "")


def test_both_closed(tiny: Path) -> None:
    assert shell("DGEMMA generate x MODEL >&- 2>&-", tiny) == (1, "", "")


def test_a_reader_that_leaves_ends_it_quietly(tiny: Path) -> None:
    assert shell("DGEMMA generate x MODEL --json | head -c 0", tiny) == (141, "", "")
    assert shell("DGEMMA generate x MODEL 2>&1 | head -c 0", tiny)[0] == 141


def test_a_closed_stdin_is_said(tiny: Path) -> None:
    code, _, said = shell("DGEMMA generate - MODEL <&-", tiny)
    assert code == 2 and "no prompt" in said, said
    code, _, said = shell("DGEMMA chat MODEL <&-", tiny)
    assert code == 2 and "stdin is closed" in said, said


@pytest.mark.parametrize(
    "command", ["generate", "generate -f -", "chat", "batch - -o OUT", "compare nano nano --prompts -"]
)
def test_a_stdin_that_cannot_be_read_is_said(tiny: Path, command: str) -> None:
    out = tiny / "out.jsonl"
    model = "--backend numpy" if "compare" in command else "MODEL"
    code, _, said = shell(f"DGEMMA {command.replace('OUT', str(out))} {model} 0>{tiny / 'written'}", tiny)
    assert code == 1 and said == "dgemma: error: stdin: Bad file descriptor\n", said


def test_a_line_without_an_end_is_refused(tiny: Path) -> None:
    _, _, said = shell("head -c 70000000 /dev/zero | (DGEMMA chat MODEL)", tiny)
    assert "stdin: longer than 64 MiB" in said and said.count("\n") == 1, said


AT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["dgemma", *{args}]
from dgemma.__main__ import run
run()
"""


def child(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["click", "numpy", "rich", "dgemma.core.engine"])
@pytest.mark.parametrize(("number", "word"), ENDING)
def test_signals_while_modules_are_imported(tiny: Path, name: str, number: int, word: str) -> None:
    if name == "click" and number != signal.SIGINT:
        pytest.skip("until a command is known, they end the process as it does any other")
    args = ["generate", "x", "-m", str(tiny), "--backend", "numpy"]
    code = AT.format(name=name, number=int(number), args=args)
    assert child(code) == (128 + number, "", f"dgemma: {word}\n")


@pytest.mark.parametrize(("number", "word"), ENDING)
@pytest.mark.parametrize("swallowed", [False, True])
def test_signals_while_a_command_works(number: int, word: str, swallowed: bool) -> None:
    """Also where Python swallows the exception: in a destructor."""
    if swallowed and number != signal.SIGINT:
        pytest.skip("only Ctrl-C is sent again")
    code = f"""
import os, sys, time
from dgemma.cli import main
from dgemma.cli.process import run
class Late:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.001)
def work(*args, **options):
    print("begun")
    if {swallowed}:
        late = Late()
        del late
    else:
        os.kill(os.getpid(), {int(number)})
    time.sleep(60)
import dgemma.cli.inspect
dgemma.cli.inspect.inspect.callback = work
sys.argv = ["dgemma", "inspect", "nano"]
run(lambda: main(prog_name="dgemma"))
"""
    assert child(code) == (128 + number, "begun\n", f"dgemma: {word}\n")


def test_what_a_background_job_ignores_stays_ignored() -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from dgemma.cli.process import run
run(lambda: (os.kill(os.getpid(), signal.SIGINT), print("done"), sys.exit(3)))
"""
    assert child(code) == (3, "done\n", "")


def test_a_panic_is_one_line() -> None:
    """What Rust libraries raise where they give up is no Exception."""
    code = """
import sys
import dgemma.cli.inspect
class Panic(BaseException): pass
def work(*args, **options):
    raise Panic("called `Option::unwrap()`")
dgemma.cli.inspect.inspect.callback = work
sys.argv = ["dgemma", "inspect", "nano"]
from dgemma.__main__ import run
run()
"""
    rc, out, said = child(code)
    assert (rc, out, said.count("\n")) == (1, "", 1) and said.startswith("dgemma: error: unexpected Panic"), said


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    """Others hand such on; Python's own stdout raises there."""
    code = """
import sys
from dgemma.cli.process import run
run(lambda: (print("x" * 300_000), sys.exit(0)))
"""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        with open(reading, "rb") as stream:
            assert len(stream.read()) == 300_001
        assert process.wait(PATIENCE) == 0
