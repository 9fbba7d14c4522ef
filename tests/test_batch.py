"""`dgemma batch`: prompts in, results out, and what a kill or a mistake in between leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main
from dgemma.tools.batch import Item, Results, read_items
from said import says
from scripted import ScriptedModel

NAMES = ("seed", "max_new_tokens")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["batch", *map(str, args)], prog_name="dgemma")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    model = ScriptedModel(["ok"])
    monkeypatch.setattr(dgemma, "load", lambda *a, **k: model, raising=False)
    return model


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '"one"\n\n{"prompt": "two", "seed": 7, "id": "b", "answer": "x"}\r\n'
        '{"messages": [{"role": "user", "content": "three"}], "system": "be kind"}\n{"prompt": "four", "system": "s"}'
    )
    return path


def test_results(model: ScriptedModel, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run(prompts, "--out", out, "-m", tmp_path, "--seed", 3)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert result.stderr == f"4 answered: {out}\n"
    got = lines(out)
    assert [one["line"] for one in got] == [1, 3, 4, 5]
    assert all(one["text"] == "ok" and one["finish_reason"] == "stop" and one["token_ids"] == [1] for one in got)
    assert (got[1]["id"], got[1]["answer"]) == ("b", "x") and "seed" not in got[1]
    asked = model.asked
    assert [options["seed"] for _, options in asked] == [3, 7, 3, 3]
    system = {"role": "system", "content": "be kind"}
    assert asked[0][0] == "one" and asked[2][0] == [system, {"role": "user", "content": "three"}]


def test_empty_answers_are_noticed(monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(dgemma, "load", lambda *a, **k: ScriptedModel([" "]), raising=False)
    result = run(prompts, "--out", tmp_path / "out.jsonl", "-m", tmp_path)
    assert result.exit_code == 0
    assert result.stderr.startswith("dgemma: note: 4 answers are empty: line 1, 3, 4, 5\n4 answered")


def test_going_on(model: ScriptedModel, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(prompts, "--out", out, "-m", tmp_path).exit_code == 0
    whole = out.read_bytes()
    records = whole.splitlines(keepends=True)
    for cut in (0, 3, len(records[0]) - 1, len(records[0]), len(records[0]) + 9, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        model.asked.clear()
        result = run(prompts, "--out", out, "-m", tmp_path)
        assert result.exit_code == 0 and out.read_bytes() == whole
        kept = whole[:cut].count(b"\n")
        assert len(model.asked) == 4 - kept
        assert (f"{kept} were there already" in result.stderr) == (kept > 0)


def test_other_settings_or_prompts_are_not_passed_over(model: ScriptedModel, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(prompts, "--out", out, "-m", tmp_path).exit_code == 0
    before = out.read_bytes()
    for extra in (["--seed", 1], ["--greedy"], ["--system", "x"]):
        result = run(prompts, "--out", out, "-m", tmp_path, *extra)
        assert result.exit_code == 1 and "other prompts, settings or another model" in result.stderr
        assert out.read_bytes() == before
    prompts.write_text(prompts.read_text() + '\n"five"')
    assert run(prompts, "--out", out, "-m", tmp_path).exit_code == 0
    assert out.read_bytes().startswith(before) and len(lines(out)) == 5
    prompts.write_text('"zero"\n' + prompts.read_text())
    assert run(prompts, "--out", out, "-m", tmp_path).exit_code == 1
    assert run(prompts, "--out", out, "-m", tmp_path, "--force").exit_code == 0
    assert [one["line"] for one in lines(out)] == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no prompts"]), ('"a"\n\nhello', ["line 3 is not JSON"]), ("3", ["line 1", "a string, or an object"]),
        ('{"prompt": ""}', ["line 1", "prompt is ''"]), ('{"prompt": 3}', ["prompt is 3"]),
        ('{"prompt": "a", "messages": []}', ["either"]), ('{"id": 1}', ["either"]),
        ('{"messages": "a"}', ["messages is 'a'"]), ('{"prompt": "a", "text": "b"}', ["'text'", "another name"]),
        ('{"prompt": "a", "prompt": "b"}', ["stands twice"]), ('{"prompt": "a", "system": 1}', ["system is 1"]),
        ('{"messages": [{"role": "system"}], "system": "a"}', ["two system prompts"]), ("[" * 99_999, ["not JSON"]),
        ('{"prompt": "a", "id": ' + 500 * "[" + 500 * "]" + "}", ["line 1", "100 deep"]),
        ('{"prompt": "a", "raw": true}', ["line 1", "raw", "--raw"]),
        ('{"prompt": "a", "dfa": {}}', ["line 1", "dfa", "regex"]),
    ],
)  # fmt: skip
def test_lines_that_are_none(text: str, words: list[str]) -> None:
    with says("in.jsonl", *words):
        read_items(text, "in.jsonl", options=NAMES)


def test_every_line_is_checked_before_the_first_is_answered(
    model: ScriptedModel, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(prompt: Any, **options: Any) -> Any:
        """As a model does: what cannot be is said at once, not with the first event."""
        if prompt == "four":
            raise dgemma.DgemmaError("too long")
        return ScriptedModel.stream(model, prompt, **options)

    monkeypatch.setattr(model, "stream", stream)
    prompts.write_text('"one"\n{"prompt": "four"}')
    result = run(prompts, "--out", tmp_path / "out.jsonl", "-m", tmp_path)
    assert result.exit_code == 1 and f"{prompts}: line 2: too long" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_line_that_fails_does_not_stop_the_others(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(ScriptedModel):
        def stream(self, prompt: Any, **options: Any) -> Any:
            events = super().stream(prompt, **options)
            yield next(events)
            if prompt == "two" and not mended:
                raise dgemma.DgemmaError("came to NaN")
            yield from events

    mended: list[bool] = []
    monkeypatch.setattr(dgemma, "load", lambda *a, **k: Model(["ok"]), raising=False)
    out = tmp_path / "out.jsonl"
    result = run(prompts, "--out", out, "-m", tmp_path)
    assert result.exit_code == 1 and [one["line"] for one in lines(out)] == [1, 4, 5]
    assert result.stderr.startswith(f"3 answered: {out}\ndgemma: error: ")
    assert f"{prompts}: line 3: came to NaN; the same command tries again" in result.stderr
    mended.append(True)
    assert run(prompts, "--out", out, "-m", tmp_path).exit_code == 0
    assert [one["line"] for one in lines(out)] == [1, 4, 5, 3]


def test_lines_are_answered_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On nano: several lines in one pass, results in order and those of one line at a time."""
    board, given = ".3.1 .2.. .... ...4", tmp_path / "in.jsonl"
    asked = [{"prompt": board, "seed": seed, "max_new_tokens": 9 + 8 * seed} for seed in range(6)]
    given.write_text("".join(json.dumps(one) + "\n" for one in asked))
    rows: list[int] = []
    whole = dgemma.load

    def noting(*given: Any, **options: Any) -> Any:
        made = whole(*given, **options)
        step = made.engine.passes.step
        made.engine.passes.step = lambda slots, *rest: (rows.append(len(slots)), step(slots, *rest))[1]
        return made

    monkeypatch.setattr(dgemma, "load", noting)
    found = []
    for count in (1, 4):
        rows.clear()
        out = tmp_path / f"out{count}"
        assert run(given, "--out", out, "--backend", "numpy", "--rows", str(count)).exit_code == 0
        assert max(rows) == count
        found.append([{k: v for k, v in one.items() if k != "stats"} for one in lines(out)])
    assert found[0] == found[1] and [one["line"] for one in found[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "text",
    [
        "my thesis",
        "my thesis\n",
        "\n",
        '{"line": 1}\n',
        '{"line": [], "key": "a"}\n',
        '{"line": 1, "key": [2]}\n',
        '{"a": 1}\n{"line',
        "[1]\n",
    ],
)
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_other_files_are_left_alone(
    model: ScriptedModel, prompts: Path, tmp_path: Path, text: str, force: list[str]
) -> None:
    out = tmp_path / "thesis"
    out.write_text(text)
    for name in (out, prompts):
        before = name.read_bytes()
        result = run(prompts, "--out", name, "-m", tmp_path, *force)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr
        assert name.read_bytes() == before
    assert model.asked == []
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    assert "link" in run(prompts, "--out", link, "-m", tmp_path).stderr and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("line", ['{"prompt": "a", "system": "b"}', '{"messages": [{"role": "user", "content": "a"}]}'])
def test_raw_leaves_nothing_out_in_silence(model: ScriptedModel, prompts: Path, tmp_path: Path, line: str) -> None:
    prompts.write_text(f'"a"\n{line}\n')
    result = run(prompts, "--out", tmp_path / "out", "-m", tmp_path, "--raw")
    assert result.exit_code == 1 and "line 2: messages and system" in result.stderr and model.asked == []
    assert not (tmp_path / "out").exists()


def test_two_at_once(tmp_path: Path) -> None:
    with Results(tmp_path / "out", {}), says("another process"):
        Results(tmp_path / "out", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no limit on a file's size to be had")
def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from dgemma.tools.batch import Item, Results
from dgemma.core.errors import DgemmaError
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Results(Path(sys.argv[1]), {}) as results:
    results.append({"line": 1, "key": "a", "text": "short"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        results.append({"line": 2, "key": "a", "text": "x" * 5000})
    except DgemmaError as error:
        print(error)
"""
    path = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "goes on from here" in done.stdout and "ulimit -f" in done.stdout
    assert [one["line"] for one in lines(path)] == [1]


def test_killed_and_gone_on(tmp_path: Path) -> None:
    """The whole of it, on nano: what comes of many pieces is what comes of one."""
    board, whole, pieces = ".3.1 .2.. .... ...4", tmp_path / "whole", tmp_path / "pieces"
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps({"prompt": board, "seed": seed}) + "\n" for seed in range(12)))
    base = [sys.executable, "-m", "dgemma", "batch", str(given), "--backend", "numpy", "--out"]
    subprocess.run([*base, str(whole)], check=True, capture_output=True)
    child = subprocess.Popen([*base, str(pieces)], stderr=subprocess.PIPE)
    while child.poll() is None and not (pieces.exists() and pieces.read_bytes().count(b"\n") >= 3):
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    subprocess.run([*base, str(pieces)], check=True, capture_output=True)
    got, want = ([{k: v for k, v in one.items() if k != "stats"} for one in lines(path)] for path in (pieces, whole))
    assert got == want and len(got) == 12


def test_options_that_came_later_leave_the_keys_of_earlier_results() -> None:
    item = Item(line=1, asked="x", options={}, carried={})
    assert item.key({"seed": 0, "canvas_length": None}) == item.key({"seed": 0})
    assert item.key({"seed": 0, "canvas_length": 16}) != item.key({"seed": 0})
    assert item.key({"seed": 0, "steps": None}) != item.key({"seed": 0})  # as it was


def test_a_line_may_hold_tokens(model: ScriptedModel, tmp_path: Path) -> None:
    """By place from the first on, or by position, which JSON writes as text."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    held: list[Any] = [{"3": 30}, {"3": 30, "x": 5}, [-1, 30], None]
    path.write_text("".join(json.dumps({"prompt": "a", "held": one}) + "\n" for one in held))
    assert run(path, "--out", out, "-m", tmp_path).exit_code == 0
    assert [options.get("held") for _, options in model.asked[:4]] == [{3: 30}, *held[1:]]
    assert not any("held" in one for one in lines(out))
