"""Records of a stream: the same events come back, whatever ended them; nothing is lost or written over."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import dgemma
from dgemma.canvas.candidate import Filled
from dgemma.canvas.edit import Edited
from dgemma.cli import main
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit, Done, Draft, Event
from dgemma.show.pacing import LONGEST, delays
from recordings import Told, recorded, scripted, spelled
from said import check_line, says
from scripted import ScriptedModel
from test_cli import Terminal

BOARD = "..4.2.\n.6...4\n2.....\n.....5\n5...1.\n.1.3.."
RESULT = "354621\n162534\n245163\n631245\n523416\n416352"


def same(one: Event, other: Event) -> bool:
    """Whether two events are the same, entropies as a record rounds them."""
    if not isinstance(one, Draft) or not isinstance(other, Draft):
        return one == other
    arrays = [(one.tokens, other.tokens), (one.accepted, other.accepted), (one.following, other.following)]
    arrays.append((one.held, other.held))
    return (
        (one.canvas, one.step, one.steps) == (other.canvas, other.step, other.steps)
        and all(a is b is None or (a is not None and b is not None and a.dtype == b.dtype) for a, b in arrays)
        and all(np.array_equal(a, b) for a, b in arrays if a is not None and b is not None)
        and np.allclose(one.entropy, other.entropy, atol=5e-4, rtol=0, equal_nan=True)
        and (one.log_accept is None) == (other.log_accept is None)
    )


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="dgemma")


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedModel]:
    def install(*args: Any, **options: Any) -> ScriptedModel:
        model = ScriptedModel(*args, **options)
        monkeypatch.setattr(dgemma, "load", lambda *a, **k: model, raising=False)
        return model

    return install


# ---- The same events --------------------------------------------------------------------------------------------


def test_what_was_recorded_comes_back(tmp_path: Path) -> None:
    model = dgemma.load("nano", backend="numpy")
    stream = model.stream(BOARD, seed=3)
    events = list(dgemma.record(stream, tmp_path / "r.jsonl", title="a board"))
    recording = dgemma.replay(tmp_path / "r.jsonl")
    assert all(same(*pair) for pair in zip(events, recording, strict=True))
    (turn,) = recording.turns
    assert turn.whole and recording.cut is None and turn.asked.title == "a board"
    assert turn.asked.prompt == tuple(model.prompt_ids(BOARD)) and BOARD in turn.text
    assert turn.asked.ends == (1, 5) and turn.asked.budget == 48 and turn.asked.options["seed"] == 3
    assert turn.times == sorted(turn.times)
    drafts = [event for event in recording if isinstance(event, Draft)]
    for draft in drafts:  # spelled without the model
        tokens = draft.tokens.tolist()
        assert turn.asked.tokenizer.decode(tokens, special=True) == model.tokenizer.decode(tokens, special=True)
    # And a record of a record is the same.
    assert [*map(same, dgemma.record(turn, tmp_path / "again.jsonl"), events)] == [True] * len(events)


def test_held_positions_following_and_what_is_not_finite(tmp_path: Path) -> None:
    told = spelled("aé世🙂b", held=3)
    told.events[1].entropy[:2] = np.nan, np.inf  # type: ignore[union-attr]
    recording = recorded(told, tmp_path / "r.jsonl")
    told.events[1].entropy[1] = np.nan  # type: ignore[union-attr]
    assert [*map(same, recording, told)] == [True] * len(told.events)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[3]["draft"]["held"].startswith("1110") and lines[3]["draft"]["log_accept"] == -1.235
    frames = recording.turns[0].asked.frames()
    shown = [frames.add(event) for event in recording if isinstance(event, Draft)]
    assert "".join(span.text for span in shown[-1].spans) == "aé世🙂b"


def test_fills_and_edits_say_what_they_answer(tmp_path: Path) -> None:
    model = dgemma.load("nano", backend="numpy")
    filled = dgemma.watch(model.stream_fill(text := "354621\n16<fill:4>\n245163", steps=4))
    assert isinstance(filled, Filled) and filled.text.startswith("354621\n16") and filled.text.endswith("\n245163")
    list(dgemma.record(model.stream_fill(text, steps=4), tmp_path / "fill.jsonl"))
    edited = dgemma.watch(model.stream_edit("1234\n4321\n", lines=(2, 2), steps=2))
    assert isinstance(edited, Edited) and edited.text.startswith("1234\n")
    drafts = [event for event in dgemma.replay(tmp_path / "fill.jsonl") if isinstance(event, Draft)]
    assert drafts and all(draft.held is not None and draft.held.any() for draft in drafts)


def test_a_generation_runs_as_it_would_alone(tmp_path: Path) -> None:
    stream = dgemma.record(scripted(["a", "b"], canvas=1), tmp_path / "r.jsonl")
    next(stream)
    stream.close()
    with says("nothing was recorded" if os.path.getsize(tmp_path / "r.jsonl") < 200 else "r.jsonl"):
        recording = dgemma.replay(tmp_path / "r.jsonl")
        raise DgemmaError(str(recording.cut))


def test_only_streams_that_say_what_they_answer(tmp_path: Path) -> None:
    with says("record got a list", "model.stream"):
        dgemma.record([], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_small(tmp_path: Path) -> None:
    """A pass over 256 positions takes less than 5 KB."""
    rng = np.random.default_rng(0)
    events: list[Event] = [
        Draft(
            canvas=0, step=step, steps=48, tokens=rng.integers(0, 200_000, 256).astype(np.int32),
            accepted=rng.random(256) < 0.5, entropy=rng.random(256).astype(np.float32),
            following=rng.integers(0, 200_000, 256).astype(np.int32),
        )
        for step in range(10)
    ]  # fmt: skip
    told = Told(events, scripted([]).asked)
    told.asked.tokenizer.words = ["x"] * 200_000  # type: ignore[attr-defined]
    recorded(told, tmp_path / "r.jsonl")
    pieces = 10 * 384 * len('[123456,"x"],')
    assert os.path.getsize(tmp_path / "r.jsonl") - pieces < 10 * 5000


# ---- What ends early, and what is broken ------------------------------------------------------------------------


def test_cut_anywhere(tmp_path: Path) -> None:
    """A record is good up to its last line; a cut is said, and nothing else goes wrong."""
    told = spelled("aé世🙂b", held=1)
    recorded(told, tmp_path / "r.jsonl")
    data, cut = (tmp_path / "r.jsonl").read_bytes(), tmp_path / "cut.jsonl"
    for size in range(0, len(data), 13):
        cut.write_bytes(data[:size])
        try:
            recording = dgemma.replay(cut)
        except DgemmaError as error:
            check_line(error, "cut.jsonl")
            assert data[:size].count(b"\n") < 3
        else:
            assert recording.cut is not None and recording.cut.isprintable()
            events = list(recording)
            assert [*map(same, events, told)] == [True] * len(events) and len(events) == data[:size].count(b"\n") - 2


VALUES = [None, -1, 1 << 40, 10**400, 0.5, "x", "\ud800", [], {}, [[]], True, [1, "a"], [1 << 40]]


@given(data=st.data())
def test_damage_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    recorded(spelled("é!", held=1), folder / "r.jsonl")
    lines = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    for _ in range(20):
        broken = copy.deepcopy(lines)
        place: Any = broken
        key: Any = data.draw(st.integers(0, len(lines) - 1))
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
        if data.draw(st.booleans()):
            place[key] = data.draw(st.sampled_from(VALUES))
        else:
            del place[key]
        (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
        try:
            list(dgemma.replay(folder / "r.jsonl"))
        except DgemmaError as error:
            check_line(error, "r.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not a record"]), ("hello", ["not a record"]), ("{}\n", ["not a record"]), ("\0" * 99, ["not a record"]),
        ('{"format": "dgemma record 2"}\n', ["another version", "record 2"]), ("[" * 100_000, ["not a record"]),
        ('{"format": "dgemma record 1"}\n', ["nothing was recorded"]),
        ('{"format": "dgemma record 1"}\nx\n', ["line 2", "not JSON"]),
        ('{"format": "dgemma record 1"}\n[]\n', ["line 2", "expected an object"]),
        ('{"format": "dgemma record 1"}\n{"t": 0, "song": 1}\n', ["line 2", "song"]),
        ('{"format": "dgemma record 1"}\n{"t": 0, "prefill": {"done": 0, "total": 0}}\n', ["line 2", "before"]),
    ],
)  # fmt: skip
def test_what_is_no_record(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with says("r.jsonl", *words):
        dgemma.replay(tmp_path / "r.jsonl")
    assert run("replay", tmp_path / "r.jsonl").exit_code == 1
    with says("no such file"):
        dgemma.replay(tmp_path / "none")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    recorded(scripted(["a"]), path)
    first = path.read_bytes()
    with says("r.jsonl", "is there already", "force"):
        dgemma.record(scripted(["b"]), path)
    os.link(path, tmp_path / "other")
    list(dgemma.record(scripted(["c"]), path, force=True))
    assert (tmp_path / "other").read_bytes() == first, "another name of it lost what it held"
    (tmp_path / "thesis.txt").write_text("years of work")
    with says("thesis.txt", "is no record"):
        dgemma.record(scripted(["b"]), tmp_path / "thesis.txt", force=True)
    (tmp_path / "link").symlink_to(path)
    for name, word in [("link", "a link"), ("none/r.jsonl", "no folder"), ("", "a folder")]:
        with says(word):
            dgemma.record(scripted(["b"]), f"{tmp_path}/{name}", force=True)
    assert [event.text for event in dgemma.replay(path) if isinstance(event, Commit)] == ["c"]


def test_a_full_disk_ends_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., ScriptedModel]
) -> None:
    write(["one ", "two ", "three"])
    room, real = [900], os.write

    def full(handle: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (done := real(handle, bytes(data[: room[0]])))
        return done

    monkeypatch.setattr("dgemma.show.record.os.write", full)
    result = run("generate", "x", "-m", tmp_path, "--record", tmp_path / "r.jsonl", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "one two three\n")
    assert result.stderr.count("\n") == 1 and "r.jsonl: the disk is full" in result.stderr
    recording = dgemma.replay(tmp_path / "r.jsonl")
    assert recording.cut is not None and "ends before the answer does" in recording.cut

    room[0] = 900
    again = run("chat", "-m", tmp_path, "--record", tmp_path / "chat.jsonl", stdin="x\ny\nz\n")
    assert (again.exit_code, again.stdout) == (0, "one two three\n" * 3), "a chat goes on"
    assert again.stderr.count("chat.jsonl: the disk is full") == 1

    room[0] = 900
    events = []
    with says("the disk is full"):
        for event in dgemma.record(scripted(["one ", "two ", "three"]), tmp_path / "other.jsonl"):
            events.append(event)
    assert isinstance(events[-1], Done)


def test_a_kill_leaves_what_was_recorded(tmp_path: Path) -> None:
    code = f"""
import sys, time
import dgemma
from recordings import scripted
for event in dgemma.record(scripted(["word "] * 9, canvas=1), {str(tmp_path / "r.jsonl")!r}):
    print(type(event).__name__, flush=True)
    if type(event).__name__ == "Commit":
        time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    assert child.stdout is not None
    while child.stdout.readline() != "Commit\n":
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    events = list(recording := dgemma.replay(tmp_path / "r.jsonl"))
    assert isinstance(events[-1], Commit) and recording.cut is not None


# ---- Commands ---------------------------------------------------------------------------------------------------


def test_commands_keep_what_they_generate(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = run("generate", BOARD, "--backend", "numpy", "--record", path, "--seed", 1, "-q")
    plain = run("generate", BOARD, "--backend", "numpy", "--seed", 1, "-q")
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == (plain.stdout, plain.stderr)
    (turn,) = dgemma.replay(path).turns
    assert turn.asked.model == "nano"
    assert turn.asked.title == f"$ dgemma generate '{BOARD}' --backend numpy --seed 1 -q"
    again = run("replay", path)
    assert (again.exit_code, again.stdout, again.stderr) == (0, plain.stdout, "")
    refused = run("generate", BOARD, "--backend", "numpy", "--record", path)
    assert refused.exit_code == 1 and "is there already" in refused.stderr and refused.stdout == ""
    forced = run("generate", BOARD, "--backend", "numpy", f"--record={path}", "--force", "--format", "result", "-q")
    assert forced.exit_code == 0 and json.loads(forced.stdout)["text"].startswith("354621")


def test_a_chat_is_kept_turn_by_turn(tmp_path: Path, write: Callable[..., ScriptedModel]) -> None:
    write(["fine"], thinking="hm")
    result = run("chat", "-m", tmp_path, "--record", tmp_path / "r.jsonl", stdin="hello\nand <b>now</b>?\n")
    assert result.exit_code == 0, result.output
    recording = dgemma.replay(tmp_path / "r.jsonl")
    assert [turn.asked.title for turn in recording.turns] == ["> hello", "> and <b>now</b>?"]
    assert all(turn.whole for turn in recording.turns)
    again = run("replay", tmp_path / "r.jsonl")
    assert again.stdout == "fine\nfine\n" and again.stderr == "thinking:\nhm\n" * 2


def test_what_was_cut_is_said(tmp_path: Path) -> None:
    recorded(scripted(["one\n", "two\n", "three"], canvas=1), tmp_path / "r.jsonl")
    data = (tmp_path / "r.jsonl").read_bytes()
    (tmp_path / "r.jsonl").write_bytes(data[: data.rindex(b"commit")])
    result = run("replay", tmp_path / "r.jsonl")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\nthree\n")
    assert result.stderr.count("\n") == 1 and "is cut short" in result.stderr


def test_replay_on_a_terminal(tmp_path: Path) -> None:
    recorded(scripted(["one ", "two\n", "\x1b[31m", "three"], canvas=2, title="$ a\x1b[31m title"), tmp_path / "r")
    screen = Terminal("replay", tmp_path / "r", "--pace", "0.05")
    assert screen.end() == 0
    assert "$ a␛[31m title" in screen.said and "step 1/2" in screen.said and "settled" in screen.said
    assert "three" in screen.said and "\x1b[31m" not in screen.said and "note" not in screen.said
    screen = Terminal("replay", tmp_path / "r")
    assert screen.end() == 0 and "as it was recorded" in screen.said
    screen = Terminal("replay", tmp_path / "r", "--step")
    for keys, seen in [("", "pass 1 of"), ("  ", "pass 3 of"), ("\x1b[D", "pass 2 of"), ("G", r"pass (\d+) of \1:")]:
        screen.type(keys)
        screen.until(f"(?s){seen}")
        screen.said = screen.said[-200:] if keys else screen.said
    screen.type("q")
    assert screen.end() == 0 and screen.said.rstrip().endswith("three")


def test_delays(tmp_path: Path) -> None:
    recording = recorded(scripted(["a", "b"]), tmp_path / "r.jsonl")
    (turn,) = recording.turns
    turn.times[:] = [0.0, 1.0, 2.0, 2.5, 99.0, 99.0, 98.0][: len(turn.times)]
    assert [seconds for _, seconds in delays(turn)] == [0.0, 1.0, 1.0, 0.5, LONGEST, 0.0, 0.0][: len(turn.times)]
    assert [seconds for _, seconds in delays(turn, speed=2)][1] == 0.5
    assert sum(seconds for _, seconds in delays(turn, pace=0.25)) == 0.25 * 3  # three passes
    refused = run("replay", tmp_path / "r.jsonl", "--speed", "2", "--pace", "1")
    assert refused.exit_code == 2 and "three ways" in refused.stderr
    refused = run("replay", tmp_path / "r.jsonl", "--step")
    assert refused.exit_code == 2 and "stdout is none" in refused.stderr


def test_batch_goes_on_with_what_it_kept(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(BOARD) for _ in range(3)) + "\n")
    path = tmp_path / "r.jsonl"
    files = ("--out", tmp_path / "out.jsonl", "--record", path)
    command = ("batch", tmp_path / "in.jsonl", "--backend", "numpy", "-q", *files)
    assert run(*command).exit_code == 0
    titles = [f"line {i} of 3" for i in (1, 2, 3)]
    recording = dgemma.replay(path)
    assert [turn.asked.title for turn in recording.turns] == titles and all(turn.whole for turn in recording.turns)
    results, kept = (tmp_path / "out.jsonl").read_bytes(), path.read_bytes()
    second = kept.index(b"line 3 of 3")
    for size in (second + 2000, 10):  # a kill, here and there
        (tmp_path / "out.jsonl").write_bytes(b"".join(results.splitlines(keepends=True)[:2]))
        path.write_bytes(kept[:size])
        assert run(*command).exit_code == 0
        again = dgemma.replay(path)
        assert again.cut is None and again.turns[-1].whole and again.turns[-1].asked.title == titles[2]
        drafts = [[one for one in turn if isinstance(one, Draft)] for turn in (again.turns[-1], recording.turns[2])]
        assert [*map(same, *drafts)] == [True] * len(drafts[0])
    assert run(*command, "--force").exit_code == 0
    assert [turn.asked.title for turn in dgemma.replay(path).turns] == titles
    refused = run(*command[:-1], tmp_path / "in.jsonl")
    assert refused.exit_code == 1 and "is no record" in refused.stderr
