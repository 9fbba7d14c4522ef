"""What a chat keeps: commands, files, history; and the notes about answers."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main
from dgemma.cli import notes as notes_of
from dgemma.cli.chat import Table, _on_terminal, chat
from dgemma.cli.conversation import Conversation, settable
from dgemma.cli.output import consoles, figures, summary
from dgemma.cli.typed import Typed
from dgemma.core.events import Done
from said import says
from scripted import STATS, ScriptedModel

SAMPLING: dict[str, Any] = {
    "seed": 0,
    "steps": None,
    "greedy": False,
    "stop": (),
    "thinking": False,
    "temperature": None,
}


def conversation(*turns: str) -> Conversation:
    talk = Conversation(system=None, sampling=dict(SAMPLING), options=settable(chat.params, SAMPLING))
    for i, text in enumerate(turns):
        if i % 2 == 0:
            talk.ask(text)
        else:
            talk.answered(text)
    return talk


def test_set_takes_what_the_command_line_takes() -> None:
    talk = conversation()
    assert talk.command("/set steps 12") == "steps 12" and talk.sampling["steps"] == 12
    talk.command("/set greedy on")
    talk.command("/set --stop a b")
    talk.command("/set temperature 0.5")
    talk.command("/thinking on")
    talk.command("/seed 4")
    assert talk.sampling == {
        "seed": 4, "steps": 12, "greedy": True, "stop": ("a b",), "thinking": True, "temperature": 0.5,
    }  # fmt: skip
    assert "steps           12\n" in talk.command("/set")
    for name in ("steps", "stop", "greedy", "temperature", "thinking", "seed"):
        talk.command(f"/set {name} default")
    assert talk.sampling == SAMPLING


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set nonsense 1", ["nonsense", "steps", "temperature"]), ("/set steps 0", ["steps", "0"]),
        ("/set steps many", ["many"]), ("/thinking", ["on or off"]), ("/seed x", ["seed", "x"]),
        ("/set greedy perhaps", ["perhaps"]), ("/save", ["name of a file"]), ("/load", ["name of a file"]),
        ("/retry", ["nothing has been asked"]), ("/\x1b[31m", ["no command"]),
        ("/save ~nobody-of-this-name/x", ["~nobody"]), ("/load ~nobody-of-this-name/x", ["no such file"]),
        (f"/save {'x' * 300}", ["too long"]), (f"/load {'x' * 300}", ["too long"]), ("/load a\0b", ["a?b"]),
    ],
)  # fmt: skip
def test_commands_that_cannot_be(line: str, words: list[str]) -> None:
    talk = conversation()
    with says(*words):
        talk.again() if line == "/retry" else talk.command(line)
    assert talk.sampling == SAMPLING


def test_save_and_load(tmp_path: Path) -> None:
    talk = conversation("héllo", "fine", "and?", "well")
    talk.command("/system be brief")
    path = tmp_path / "talk.json"
    assert talk.command(f"/save {path}").startswith("2 exchanges saved")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    talk.command(f"/save {path}")  # again, over its own
    other = conversation("x", "y")
    other.command(f"/load {path}")
    assert (other.system, other.turns, other.asked) == ("be brief", talk.turns, "and?")


@pytest.mark.parametrize(
    "text", ["my thesis", "{}", "[1]", "[" * 100_000, '{"format": "dgemma chat 1", "messages": [{"role": "user"}]}',
             '{"format": "dgemma chat 1", "messages": [{"role": "user", "content": 1}, 2], "system": null}']
)  # fmt: skip
def test_save_and_load_leave_other_files_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text(text)
    talk = conversation("x", "y")
    for command in ("save", "load"):
        with says("thesis.txt"):
            talk.command(f"/{command} {path}")
    assert path.read_text() == text and len(talk.turns) == 2
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    with says("link"):
        talk.command(f"/save {link}")
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*args: Any, **options: Any) -> ScriptedModel:
        model = ScriptedModel(*args, **options)
        monkeypatch.setattr(dgemma, "load", lambda *a, **k: model, raising=False)
        return model

    return install


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="dgemma")


def test_retry_asks_the_same_with_another_seed(scripted: Any, tmp_path: Path) -> None:
    model = scripted(["fine"])
    result = run("chat", "-m", tmp_path, stdin="one\ntwo\n/retry\n/clear\nthree\n")
    assert result.exit_code == 0, result.output
    asked = [([m["content"] for m in messages], options["seed"]) for messages, options in model.asked]
    assert asked == [(["one"], 0), (["one", "fine", "two"], 0), (["one", "fine", "two"], 1), (["three"], 1)]


def test_system_prompts_and_formats(scripted: Any, tmp_path: Path) -> None:
    model = scripted(["ok"], thinking="hm")
    result = run("generate", "x", "-m", tmp_path, "--system", "be kind", "--format", "result", "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    said = json.loads(result.stdout)
    assert said.keys() == {"text", "thinking", "token_ids", "finish_reason", "stats"}
    assert (said["text"], said["thinking"], said["token_ids"]) == ("ok", "hm", [1])
    assert model.asked[0][0] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "x"}]
    assert run("generate", "x", "-m", tmp_path, "--format", "events").stdout == run(
        "generate", "x", "-m", tmp_path, "--json"
    ).stdout  # fmt: skip
    assert run("generate", "x", "--json", "--format", "result").exit_code == 2
    assert run("generate", "x", "--raw", "--system", "y").exit_code == 2


def test_quiet_and_stats(scripted: Any, tmp_path: Path) -> None:
    scripted(["ok"])
    assert run("generate", "x", "-m", tmp_path, "-q").stderr == ""
    lines = run("generate", "x", "-m", tmp_path, "--stats").stderr.splitlines()
    assert "written            7 tokens" in lines and len(lines) == len(
        figures(Done(finish_reason="stop", stats=STATS))
    )


def test_the_summary_fits() -> None:
    done = Done(finish_reason="length", stats=STATS)
    whole = summary(done)
    for width in range(10, len(whole) + 5):
        line = summary(done, width)
        assert len(line) <= max(width, len("wrote 7 at 17.5/s")) and "wrote 7" in line
        assert width < 45 or "cut at the token budget" in line
    assert summary(done, len(whole)) == whole


@pytest.mark.parametrize(
    ("model", "prompt", "text", "thinking", "reason", "words"),
    [
        ("nano", "hello", "", "", "stop", ["nano only plays Sudoku", "--model"]),
        ("nano", ".3.1 .2.. .... ...4", "4321", "", "stop", []),
        ("nano", ".3.1\r\n.2..\r\n....\r\n...4", "4", "", "stop", []),
        ("nano", ".3.1 .2.. ....", "1", "", "stop", ["4x4 or 6x6"]),
        ("other", "hello", " \n", "", "stop", ["the answer is empty", "white space"]),
        ("other", "hello", "", "hm", "length", ["thinking took the whole budget", "--max-new-tokens"]),
        ("other", "hello", "", "hm", "stop", ["ended after thinking"]), ("other", "hello", "hi", "", "stop", []),
    ],
)  # fmt: skip
def test_notes(model: str, prompt: str, text: str, thinking: str, reason: Any, words: list[str]) -> None:
    said = notes_of.about(model, prompt, text=text, thinking=thinking, done=Done(finish_reason=reason, stats=STATS))
    assert (said is None) == (not words)
    assert all(word in str(said) for word in words)


@pytest.mark.parametrize("args", [["generate", "hello"], ["chat"]])
def test_nano_says_what_it_plays(args: list[str]) -> None:
    result = run(*args, "--backend", "numpy", stdin="hello\n" if args == ["chat"] else None)
    assert result.exit_code == 0 and result.stdout.strip() == ""
    assert result.stderr.splitlines()[0].startswith("dgemma: note: nano only plays Sudoku: ")
    assert run(*args, "--backend", "numpy", "-q", stdin="hello\n").stderr == ""


def test_a_seed_that_is_the_last_is_followed_by_the_first() -> None:
    talk = conversation("x")
    talk.command(f"/seed {2**64 - 1}")
    talk.again()
    assert talk.sampling["seed"] == 0


@pytest.mark.parametrize(
    ("lines", "known"),
    [('"a"\n"b\\u0000"\n3\n"\\ud800"\n', ["a", "?"]), ("[" * 100_000, []), ('"a', []), ("\0\n", [])],
)
def test_a_damaged_history_is_no_reason_not_to_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, known: list[str]
) -> None:
    pytest.importorskip("readline")
    history = tmp_path / "chat_history"
    history.write_text(lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    one = Typed(history)
    assert one._remembered() == known and (one.problem is None) == bool(known)
    assert Typed(tmp_path / ("x" * 300) / "chat_history").problem is None


def test_history_is_kept_private_and_bounded(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dgemma.cli import typed
typed.KEPT = 4
lines = iter(sys.argv[2:])
typed.input = lambda mark: next(lines)
one = typed.Typed(typed.history_file())
print([one._readline.get_history_item(i + 1) for i in range(one._readline.get_current_history_length())])
for _ in sys.argv[2:]:
    one.read()
one.remember()
print(one.problem)
"""

    def session(*lines: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, "-", *lines], capture_output=True, text=True, check=True,
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
        )  # fmt: skip
        return done.stdout.splitlines()

    pytest.importorskip("readline")
    file = tmp_path / "dgemma" / "chat_history"
    assert session("a", "b\nc", "  ") == ["[]", "None"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert session("d", "e", "f") == ["['a', 'b\\nc']", "None"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["b\nc", "d", "e", "f"]
    file.write_text("damaged")
    assert session("g")[0] == "[]" and "damaged; remove it" in session("g")[1]
    assert file.read_text() == "damaged"


def test_a_fault_does_not_end_a_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody foresaw is one line, and what was said before it stays."""
    taken = []

    def take(self: Table, line: str, *, stops: bool) -> None:
        taken.append(line)
        if line == "break":
            raise RuntimeError("a library's\nfault")

    class Lines:
        problem = None

        def __init__(self, history: Path | None) -> None:
            self.lines = iter(["break", "hello", None])

        def read(self) -> str | None:
            return next(self.lines)

        def remember(self) -> None:
            taken.append("remembered")

    monkeypatch.setattr("dgemma.cli.typed.Typed", Lines)
    monkeypatch.setattr(Table, "take", take)
    out, errors = consoles()
    scripted: Any = ScriptedModel("fine")
    table = Table(model=scripted, name="m", talk=conversation(), out=out, errors=errors, live=False, stats=False)
    _on_terminal(table, history=False, debug=False)
    assert taken == ["break", "hello", "remembered"]
    assert "dgemma: error: unexpected RuntimeError: a library's fault (`dgemma --debug" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        _on_terminal(table, history=False, debug=True)
