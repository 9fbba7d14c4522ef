"""The commands, as a user meets them: in a pipe, on a terminal, and when something is wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main
from dgemma.show.frame import printable
from scripted import ScriptedModel
from tiny import tiny_checkpoint

PATIENCE = 120.0  # seconds until a child process on a busy machine counts as hung


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("cli"), canvas_length=16)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ScriptedModel]:
    """Make `--model tmp_path` load a scripted model."""

    def install(*args: Any, **options: Any) -> ScriptedModel:
        model = ScriptedModel(*args, **options)
        monkeypatch.setattr(dgemma, "load", lambda *a, **k: model, raising=False)
        monkeypatch.setenv("PWD", str(tmp_path))
        return model

    return install


def run(*args: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="dgemma")


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "dgemma", *map(str, args)]


def error_of(result: Result, code: int) -> str:
    """The one line an error is."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("dgemma: error: "), result.stderr
    return result.stderr


# ---- Starting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["chat", "-h"],
        ["batch", "-h"],
        ["models", "-h"],
        ["replay", "-h"],
    ],
)
def test_help_imports_no_framework(args: list[str]) -> None:
    code = f"""
import sys
import dgemma
from dgemma.cli import main
try:
    main({args}, prog_name="dgemma")
finally:
    heavy = {{"torch", "mlx", "onnxruntime", "transformers", "tokenizers", "jinja2", "numpy", "rich"}}
    print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "first", ["dgemma.export.graphs, dgemma.convert.plan", "dgemma.convert, dgemma.export", "dgemma"]
)
def test_functions_with_the_names_of_packages(first: str, tmp_path: Path) -> None:
    """Whatever is imported, before or behind: `dgemma.export` and `dgemma.convert` are the functions."""
    code = f"""
import {first}
import inspect
import dgemma
seen = [dgemma.export, dgemma.convert]
import dgemma.export.exporter, dgemma.export.graphs, dgemma.convert.converter, dgemma.tools.verify_onnx
from dgemma.export import target
from dgemma.convert import plan
assert seen == [dgemma.export, dgemma.convert]
for one in seen:
    names = inspect.signature(one).parameters
    assert not {{"args", "options"}} & names.keys() and {{"source", "out", "force", "progress"}} <= names.keys()
    assert all(f"{{name}}: " in one.__doc__ for name in names) and "Raises:" in one.__doc__
    try:
        one("no/such/folder", "out")
    except dgemma.DgemmaError as error:
        assert "\\n" not in str(error)
    else:
        raise AssertionError
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


def test_module_and_version() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == f"dgemma {dgemma.__version__}\n"
    assert "generate" in run().stdout and run().exit_code == 0


# ---- Prompts and text -------------------------------------------------------------------------------------------


def test_stdout_is_the_text_alone(tiny: Path) -> None:
    expected = dgemma.load(tiny, backend="numpy").generate("hello", max_new_tokens=40, seed=3).text
    result = run("generate", "hello", "-m", tiny, "--backend", "numpy", "-n", 40, "--seed", 3)
    assert result.exit_code == 0
    assert result.stdout == expected.removesuffix("\n") + "\n"
    assert re.fullmatch(r"prompt \d+ tokens at .*/s, wrote \d+ at .* steps/canvas, .*peak .*\n", result.stderr)


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (["a\nb"], None), (["-"], "a\nb\n"), ([], "a\nb\n"), ([], "a\r\nb\r\n"), ([], "a\rb\r"), (["a\r\nb"], None),
        ([], "\ufeffa\nb"), (["--file", "FILE"], None), (["-", "--file", "FILE"], "ignored"),
    ],
)  # fmt: skip
def test_prompts(scripted: Any, tmp_path: Path, args: list[str], stdin: str | None) -> None:
    model = scripted(["ok"])
    (tmp_path / "prompt.txt").write_text("a\nb\n")
    args = [str(tmp_path / "prompt.txt") if arg == "FILE" else arg for arg in args]
    result = run("generate", "-m", tmp_path, *args, stdin=None if stdin is None else stdin.encode())
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert [prompt for prompt, _ in model.asked] == ["a\nb"]


def test_options_reach_the_model(scripted: Any, tmp_path: Path) -> None:
    model = scripted(["ok"])
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "null"}')
    result = run(
        "generate", "x", "-m", tmp_path, "-n", 7, "--seed", 1, "--steps", 2, "--schedule-steps", 3, "--t-min", 0.1,
        "--t-max", 0.9, "--entropy-bound", 0.5, "--confidence", 0.25, "--stop", "a", "--stop", "b", "--thinking",
        "--raw", "--temperature", 0.5, "--greedy", "--stability", 2, "--canvas-length", 16, "--choices", "a",
        "--choices", "b", "--regex", "a|b", "--json-schema", schema, "--feedback", 0.5, "--init", "a",
        "--strength", 0.25, "--thinking-budget", 9,
    )  # fmt: skip
    assert result.exit_code == 0
    assert model.asked[0][1] == {
        "max_new_tokens": 7, "seed": 1, "steps": 2, "schedule_steps": 3, "t_min": 0.1, "t_max": 0.9,
        "entropy_bound": 0.5, "confidence": 0.25, "stop": ("a", "b"), "thinking": True, "raw": True,
        "temperature": 0.5, "greedy": True, "stability": 2, "specials": False, "canvas_length": 16,
        "choices": ("a", "b"), "regex": "a|b", "schema": {"type": "null"}, "feedback": 0.5, "init": "a",
        "strength": 0.25, "thinking_budget": 9,
    }  # fmt: skip


def test_thinking_goes_to_stderr(scripted: Any, tmp_path: Path) -> None:
    scripted(["yes"], thinking="let me see")
    result = run("generate", "x", "-m", tmp_path, "--thinking")
    assert result.stdout == "yes\n"
    assert result.stderr.startswith("thinking:\nlet me see\n")


def test_pipes_get_the_text_unchanged(scripted: Any, tmp_path: Path) -> None:
    scripted(["\x1b[2J\ttab", " trailing ", "\n\n"])
    assert run("generate", "x", "-m", tmp_path).stdout == "\x1b[2J\ttab trailing \n\n"


def test_json_events(tiny: Path) -> None:
    args = ("generate", "hi", "-m", tiny, "--backend", "numpy", "-n", 20, "--steps", 3)
    plain, result = run(*args), run(*args, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["prefill"] * 2 + (["draft"] * 3 + ["commit"]) * 2 + ["done"]
    draft = events[2]
    assert draft.keys() == {"event", "canvas", "step", "steps", "tokens", "text", "accepted", "entropy"}
    assert len(draft["tokens"]) == len(draft["accepted"]) == len(draft["entropy"]) == 16
    text = "".join(event["text"] for event in events if event["event"] == "commit")
    assert text.removesuffix("\n") + "\n" == plain.stdout
    assert events[-1]["stats"]["emitted_tokens"] == sum(len(e["tokens"]) for e in events if e["event"] == "commit")
    assert result.stdout.isascii()


# ---- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "stdin", "code", "said"),
    [
        (["generate", "-m", "TINY"], "", 2, "the prompt is empty"),
        (["generate", " \n ", "-m", "TINY"], None, 2, "the prompt is empty"),
        (["generate", "x", "--file", __file__], None, 2, "not both"),
        (["generate", "--file", "no such file.txt"], None, 2, "does not exist"),
        (["generate", "--file", "/"], None, 2, "is a directory"),
        (["generate", "x", "--steps", "0"], None, 2, "--steps"),
        (["generate", "x", "--steps", "many"], None, 2, "not a valid integer"),
        (["generate", "x", "--canvas-length", "some"], None, 2, "neither a whole number nor fit"),
        (["generate", "x", "--canvas-length", "0"], None, 2, "--canvas-length"),
        (["generate", "x", "-m", "TINY", "--canvas-length", "513"], None, 1, "the model's context is 512"),
        (["generate", "x", "--seed", "-1"], None, 2, "--seed"),
        (["generate", "x", "--backend", "tpu"], None, 2, "not one of"),
        (["generate", "x", "y"], None, 2, "unexpected extra argument"),
        (["nonsense"], None, 2, "No such command"),
        (["--nonsense"], None, 2, "No such option"),
        (["generate", "-m", "TINY"], b"caf\xe9\n", 1, "stdin: not UTF-8 (byte 3 is 0xe9)"),
        (["generate", "x", "-m", "no such model"], None, 1, "no model 'no such model'"),
        (["generate", "x", "-m", "/"], None, 1, "config.json: no such file"),
        (["generate", "x", "-m", "TINY", "--device", "cuda"], None, 1, "'numpy' runs on the cpu only"),
        (["generate", "x", "-m", "TINY", "--t-min", "0.9", "--t-max", "0.1"], None, 1, "t_max is 0.1"),
        (["generate", "x", "-m", "TINY", "--t-min", "nan"], None, 1, "t_min is NaN"),
        (["generate", "x", "-m", "TINY", "--stop", ""], None, 1, "stop: expected non-empty strings"),
        (["generate", "-m", "TINY"], "long " * 500, 1, "the model's context is 512"),
        (["chat", "-m", "/"], "x", 1, "config.json: no such file"),
        (["inspect", "~nobody-of-this-name/x"], None, 1, "no model"), (["inspect", "x" * 300], None, 1, "no model"),
        (["inspect", "--config", "x" * 300], None, 1, "no such file"), (["x" * 9999], None, 2, "xxx ... xxx"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tiny: Path, args: list[str], stdin: Any, code: int, said: str) -> None:
    if "TINY" in args:
        args = [str(tiny) if arg == "TINY" else arg for arg in args] + ["--backend", "numpy"]
    assert said in error_of(run(*args, stdin=stdin), code)


def test_the_unexpected_is_one_line_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("first\nsecond \x1b[31m")

    monkeypatch.setattr(dgemma, "load", broken, raising=False)
    said = error_of(run("generate", "x", "-m", tmp_path), 1)
    assert said == "dgemma: error: unexpected RuntimeError: first second ?[31m (`dgemma --debug ...` shows where)\n"
    with pytest.raises(RuntimeError, match="first"):
        main(["--debug", "generate", "x", "-m", str(tmp_path)], prog_name="dgemma")


def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    line = f"{' '.join(command('generate', 'x', '-m', tiny, '--backend', 'numpy', '--json'))} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout == '{"event": "prefill", "done": 0, "total": 17}\n'
    assert done.stderr == ""


def scripted_child(*args: str | Path, words: str, pause: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in a child process, on a model that writes `words` over and over, one a canvas.

    What a random model writes, and when it ends, is another processor's business.
    """
    code = f"""
import sys
import dgemma
from dgemma.__main__ import run
from scripted import ScriptedModel
dgemma.load = lambda *args, **options: ScriptedModel([{words!r}] * 5000, canvas=1, pause={pause})
sys.argv = {["dgemma", *map(str, args)]!r}
run()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment
    return subprocess.Popen(  # unbuffered: `communicate` does not see what a buffer has
        [sys.executable, "-c", code], bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def test_ascii_output(tmp_path: Path) -> None:
    child = scripted_child("generate", "x", "-m", tmp_path, words="caf\u00e9 ", PYTHONIOENCODING="ascii")
    text, _ = child.communicate(timeout=PATIENCE)
    assert (child.returncode, text) == (0, b"caf? " * 5000 + b"\n")


def test_interrupted_in_a_pipe(tmp_path: Path) -> None:
    child = scripted_child("generate", "x", "-m", tmp_path, words="word ", pause=0.1)
    assert child.stdout is not None
    first = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    rest, said = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert said == b"dgemma: interrupted\n"
    assert re.fullmatch(rb"(word )+\n?", first + rest)


# ---- On a terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """A child process on a pseudo-terminal of 80 columns."""

    def __init__(self, *args: str | Path, **environment: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # Warnings as errors are pytest's; a child that fork() left in a threaded process execs at once.
            os.execve(sys.executable, command(*args), os.environ | {"TERM": "xterm", "COLUMNS": "80"} | environment)
        self.said = ""

    def until(self, pattern: str) -> str:
        """Read until a pattern comes."""
        return self._read(lambda: re.search(pattern, self.said) is not None)

    def _read(self, enough: Callable[[], bool]) -> str:
        deadline = time.monotonic() + PATIENCE
        while not enough():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"nothing more came after {self.said[-900:]!r}")
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # Linux's way of saying that the other end is closed
                    break
                if not data:
                    break
                self.said += data.decode(errors="replace")
        return self.said

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Read what is left → exit code."""
        self._read(lambda: False)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_generate_draws_on_a_terminal(tiny: Path) -> None:
    text = dgemma.load(tiny, backend="numpy").generate("x", max_new_tokens=40).text
    screen = Terminal("generate", "x", "-m", tiny, "--backend", "numpy", "-n", "40")
    assert screen.end() == 0
    said = screen.said
    assert "░" in said and "step 1/6" in said and "settled" in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") >= 1, "the cursor comes back"
    plain = CSI.sub("", said[said.rindex("settled") :]).replace("\r\n", "\n")
    last_line = printable(text).rpartition("\n")[2]
    assert f"{last_line.expandtabs()}\nwrote " in plain.replace("\r", "")
    assert set(CSI.sub("", said)) & {"\x1b", "\x07", "\x00"} == set(), "the model's control characters got through"


def test_interrupted_on_a_terminal(tiny: Path) -> None:
    screen = Terminal("generate", "x", "-m", tiny, "--backend", "numpy", "--steps", "100000", "--confidence", "0")
    screen.until(r"step \d+/100000")
    screen.type("\x03")
    assert screen.end() == 130
    assert screen.said.rstrip().endswith("dgemma: interrupted")
    assert screen.said.rindex("\x1b[?25h") > screen.said.rindex("\x1b[?25l")


def test_terminated_on_a_terminal_gives_the_cursor_back(tiny: Path) -> None:
    screen = Terminal("generate", "x", "-m", tiny, "--backend", "numpy", "--steps", "100000", "--confidence", "0")
    screen.until(r"step \d+/100000")
    os.kill(screen.pid, signal.SIGTERM)
    assert screen.end() == 128 + signal.SIGTERM
    assert screen.said.rindex("\x1b[?25h") > screen.said.rindex("\x1b[?25l")


@pytest.mark.parametrize("option", [{"TERM": "dumb"}, {}])
def test_no_live_writes_no_escapes(tiny: Path, option: dict[str, str]) -> None:
    arguments = ["--no-live", "--quiet"] if not option else ["--quiet"]  # loading is drawn where it takes long
    screen = Terminal("generate", "x", "-m", tiny, "--backend", "numpy", *arguments, **option)
    assert screen.end() == 0
    assert "step " not in screen.said and "\x1b[?25l" not in screen.said


def test_no_prompt_on_a_terminal_is_an_error() -> None:
    screen = Terminal("generate")
    assert screen.end() == 2
    assert "dgemma: error: no prompt: give PROMPT" in screen.said


def test_chat_on_a_terminal(tiny: Path) -> None:
    screen = Terminal("chat", "-m", tiny, "--backend", "numpy", "-n", "20")

    def after(said: str) -> None:
        """Wait for a prompt behind some words: what is typed before it is there, readline does not see."""
        screen.until(rf"(?s){said}.*> $")
        time.sleep(0.3)  # Python's readline misses a Ctrl-C between its prompt and its waiting for a key

    after("Ctrl-D leaves")
    screen.type("/seed 4\r")
    after("seed 4\x1b")
    screen.type("/nonsense\r")
    after("dgemma: error: no command /nonsense")
    screen.type("hello\r")
    after("wrote ")
    screen.type("\x03")
    after("\\(Ctrl-D leaves\\)")
    screen.type("again\r")
    screen.until("(?s)again\r.*step ")
    screen.type("\x03")
    after("again\r.*(stopped|wrote|leaves)")
    screen.type("\x04")
    assert screen.end() == 0


def test_a_terminal_that_goes_away_leaves_what_was_typed(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    screen = Terminal("chat", "-m", tiny, "--backend", "numpy", XDG_STATE_HOME=str(tmp_path))
    screen.until(r"(?s)Ctrl-D leaves.*> $")
    screen.type("/seed 4\r")
    screen.until("(?s)seed 4\x1b.*> $")
    os.close(screen.fd)  # as a window that is closed
    code = os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1])
    assert code in (0, 129), "the signal, or the end of input where readline missed it"
    assert (tmp_path / "dgemma" / "chat_history").read_text() == '"/seed 4"\n'


# ---- Chat in a pipe ---------------------------------------------------------------------------------------------


def test_chat_keeps_answers_and_no_thoughts(scripted: Any, tmp_path: Path) -> None:
    model = scripted(["fine"], thinking="hmm")
    lines = "hello\n\n/system be brief\nagain\\n?\n/thinking on\n//slash\n/reset\n/system\nlast\n"
    result = run("chat", "-m", tmp_path, "--system", "be kind", stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == "fine\n" * 4

    def said(system: str | None, *turns: str) -> list[dict[str, str]]:
        head = [{"role": "system", "content": system}] if system else []
        roles = ("user", "assistant")
        return head + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]

    assert [messages for messages, _ in model.asked] == [
        said("be kind", "hello"),
        said("be brief", "hello", "fine", "again\\n?"),
        said("be brief", "hello", "fine", "again\\n?", "fine", "/slash"),
        said(None, "last"),
    ]
    assert [options["thinking"] for _, options in model.asked] == [False, False, True, True]


def test_chat_in_a_pipe_ends_with_the_first_error(tiny: Path) -> None:
    result = run("chat", "-m", tiny, "--backend", "numpy", stdin="/nonsense\nx\n")
    assert result.exit_code == 1 and "no command /nonsense" in result.stderr
