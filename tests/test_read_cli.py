"""`dgemma read`: where its questions come from, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dgemma.cli import main
from tiny import tiny_checkpoint

PROMPT = "Is it so?"
QUESTIONS = {
    "wet": {"type": "yes_no", "instructions": "Does it rain?"},
    "mood": {"type": "score", "instructions": "How are they?", "criteria": ["low", "high"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("read_cli"), max_position_embeddings=4096)


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["read", *map(str, args)], input=stdin, prog_name="dgemma")


def at(tiny: Path) -> list[str]:
    return ["--model", str(tiny), "--backend", "numpy"]


def said(*args: str | Path, stdin: str | None = None) -> Any:
    done = run(*args, "--json", "--quiet", stdin=stdin)
    assert done.exit_code == 0 and done.stderr == "", done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_a_table_the_likeliest_first(tiny: Path) -> None:
    done = run(PROMPT, "-c", "y", "-c", " n\n", "-c", "?", *at(tiny))
    assert done.exit_code == 0
    head, *rows = done.stdout.splitlines()
    assert head.startswith("label mass ") and "nats; likeliest of all: " in head
    shares = [float(row.split()[0]) for row in rows]
    assert len(rows) == 3 and shares == sorted(shares, reverse=True)
    assert {row.split(maxsplit=1)[1] for row in rows} == {"y", '" n\\n"', "?"}
    assert "their probabilities say little" in done.stderr and done.stderr.startswith("dgemma: note: ")


def test_json(tiny: Path) -> None:
    found = said(PROMPT, "-c", "y", "-c", "n", *at(tiny))
    assert list(found["probabilities"]) == ["y", "n"] and sum(found["probabilities"].values()) == pytest.approx(1)
    assert found.keys() == {
        "choice", "probabilities", "label_mass", "entropy", "full_entropy", "token", "text", "argmax_is_label",
    }  # fmt: skip
    same = said("-", "-c", "y", "-c", "n", *at(tiny), stdin=f"{PROMPT}\n")
    assert same == found
    other = said(PROMPT, "-c", "y", "-c", "n", "--seed", "5", "--samples", "2", *at(tiny))
    assert other["probabilities"] != found["probabilities"]
    places = said(PROMPT, "-c", "y", "-c", "n", "--template", "1: <read>\n2: <read>", *at(tiny))["places"]
    assert len(places) == 2 and all(one["choice"] in "yn" for one in places)


def test_questions(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(QUESTIONS))
    found = said(PROMPT, "--questions", file, *at(tiny))["answers"]
    assert list(found) == ["wet", "mood"] and found["mood"]["legend"] == {"0": "low", "1": "high"}
    named = json.dumps([{"name": name, **one} for name, one in QUESTIONS.items()])
    assert said(PROMPT, "--questions", "-", *at(tiny), stdin=named)["answers"] == found
    whole = json.dumps({"state": PROMPT, "questions": QUESTIONS})
    assert said("--questions", "-", *at(tiny), stdin=whole)["answers"] == found
    joint = said(PROMPT, "--questions", file, "--joint", *at(tiny))["answers"]
    assert list(joint) == ["wet", "mood"] and joint != found
    done = run(PROMPT, "--questions", file, *at(tiny))
    assert done.exit_code == 0 and done.stdout.startswith("wet: label mass ")
    assert "  no\n" in done.stdout and "  1 high\n" in done.stdout and "; score 0." in done.stdout
    assert said(PROMPT, "--questions", file, "--system", "Be brief.", *at(tiny))["answers"] != found


def test_nano_reads_a_cell() -> None:
    found = said(".3.1 .2.. .... ...4", *(f"-c{i}" for i in range(1, 5)))
    assert found["choice"] == "4" and found["argmax_is_label"] and found["text"] == "4"


@pytest.mark.parametrize(
    ("code", "match", "args", "stdin"),
    [
        (2, "give --choice twice or more, or --questions", [PROMPT], None),
        (2, "give --choice twice or more", [PROMPT, "-c", "a"], None),
        (2, "--joint is for --questions", [PROMPT, "-c", "a", "-c", "b", "--joint"], None),
        (2, "give --questions, or --choice", [PROMPT, "-c", "a", "--questions", "-"], "{}"),
        (2, "--system stands in the chat template", [PROMPT, "-c", "a", "-c", "b", "--raw", "--system", "x"], None),
        (2, "--questions - reads stdin", ["--questions", "-"], '{"q": {}}'),
        (2, "--questions holds a state already", [PROMPT, "--questions", "-"], '{"state": "x", "questions": {}}'),
        (1, "stdin: not readable as JSON: Expecting", [PROMPT, "--questions", "-"], "{"),
        (1, "question 'q': type is None", [PROMPT, "--questions", "-"], '{"q": {}}'),
        (1, "questions is 5, expected a table", [PROMPT, "--questions", "-"], "5"),
        (1, "missing.json", [PROMPT, "--questions", "missing.json"], None),
        (1, "the template has no <read>", [PROMPT, "-c", "a", "-c", "b", "--template", "x"], None),
        (1, "choices: 'a' is there twice", [PROMPT, "-c", "a", "-c", "a"], None),
        (1, "--system stands before", ["--system", "x", "--questions", "-"], '{"state": [1], "questions": {"q": {}}}'),
    ],
)
def test_refused_in_one_line(tiny: Path, code: int, match: str, args: list[str], stdin: str | None) -> None:
    done = run(*args, *at(tiny), stdin=stdin)
    assert done.exit_code == code, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1 and match in done.stderr
