"""`compare`: nothing differs from itself, and what is damaged shows in every figure."""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main
from dgemma.core.reader import jsonable
from dgemma.runtime import DiffusionGemma
from dgemma.tools import compare as comparing
from dgemma.tools.agreement import Agreeing, Outcome, tally
from dgemma.tools.compare import Case, Comparison, read_prompts
from law import nmse
from said import says
from tiny import edit_json, rewrite, tiny_checkpoint

BOARDS = {
    ".24.\n....\n.1.3\n..1.": "3241\n1432\n4123\n2314",
    "....\n.43.\n....\n4.21": "3214\n1432\n2143\n4321",
    "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425": None,
}
WAYS: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def nano() -> DiffusionGemma:
    return dgemma.load("nano", **WAYS)


@pytest.fixture(scope="module")
def cases(nano: DiffusionGemma) -> list[dict[str, str]]:
    made = [(board, nano.generate(board).text) for board in BOARDS]
    for board, text in made:
        assert BOARDS[board] in (None, text)
    return [{"prompt": board, "answer": text, "group": f"{len(text.split())} rows"} for board, text in made]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with noise of their own size on most matrices: it still writes digits, and often wrong ones."""
    folder = dgemma.convert("nano", tmp_path_factory.mktemp("damaged") / "nano", "bf16").path
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")

    def damage(tensors: dict[str, np.ndarray]) -> None:
        draw = np.random.default_rng(0)
        for name, value in tensors.items():
            if "_proj" in name:
                wide = value.astype(np.float32)
                value[...] = wide + 0.7 * wide.std() * draw.standard_normal(wide.shape)

    return rewrite(folder, damage)


# ---- What is compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_nothing_differs_from_itself(cases: list[dict[str, str]], backend: str) -> None:
    found = dgemma.compare("nano", "nano", cases[:2], max_new_tokens=48, backend=backend, device="cpu")
    same = found.agreement
    assert (same.nmse, same.max_error, same.kl, same.entropy_shift, same.top1) == (0, 0, 0, 0, 1)
    assert same.canvases == 2 and same.passes == round(2 * found.total.steps_a) > 2
    assert same.positions == 48 * same.passes and same.entropy_a > 0
    assert found.total.steps_a == found.total.steps_b and found.total.steps_change.value == 0
    assert (found.total.solved_a, found.total.solved_b, found.total.same) == (2, 2, 2)
    assert (found.a.bytes, found.a.bits_per_weight, found.a.dtype) == (found.b.bytes, 16, "float32")


def test_damage_shows_in_every_figure(nano: DiffusionGemma, cases: list[dict[str, str]], damaged: Path) -> None:
    found = dgemma.compare(nano, damaged, cases, max_new_tokens=48, **WAYS)
    seen = found.agreement
    assert seen.nmse > 1e-3 and seen.max_error > 1 and seen.top1 < 0.99 and seen.kl > 0.01
    assert seen.entropy_shift > 0.01 and seen.entropy_b == pytest.approx(seen.entropy_a + seen.entropy_shift)
    assert found.total.steps_b > found.total.steps_a and found.total.steps_change.value > 0
    assert found.total.solved_b < found.total.solved_a == 3 and found.total.only_a > found.total.only_b == 0
    assert found.total.same < 3 and found.total.rate_change is not None and found.total.rate_change.value < 0
    assert [one.group for one in found.groups] == ["4 rows", "6 rows"]
    assert [one.prompts for one in found.groups] == [2, 1]
    assert sum(one.solved_b for one in found.groups) == found.total.solved_b


def test_quantizing_shows_in_the_sizes(nano: DiffusionGemma, cases: list[dict[str, str]], tmp_path: Path) -> None:
    report = dgemma.convert("nano", tmp_path / "4bit", "4bit")
    found = dgemma.compare(nano, report.path, cases[:1], max_new_tokens=48, **WAYS)
    assert (found.b.bytes, found.b.bits_per_weight) == (report.text_bytes, pytest.approx(report.bits_per_weight))
    assert 1e-5 < found.agreement.nmse < 1e-2 and found.total.solved_b == 1


def test_logits_are_those_of_the_model(nano: DiffusionGemma, damaged: Path, monkeypatch: Any) -> None:
    """Every pass, against `logits` of both models on what the recording says they read."""
    seen: list[tuple[np.ndarray, np.ndarray, float]] = []
    whole = Agreeing.add

    def noting(self: Agreeing, a: np.ndarray, b: np.ndarray, temperature: float) -> None:
        seen.append((a, b, temperature))
        whole(self, a, b, temperature)

    monkeypatch.setattr(Agreeing, "add", noting)
    board, other = next(iter(BOARDS)), dgemma.load(damaged, **WAYS)
    # Two canvases: the second is read behind the first, which A has committed.
    settings: Any = {"max_new_tokens": 60, "seed": 3}
    monkeypatch.setattr(
        nano, "generation", dgemma.GenerationConfig(eos_token_ids=(15,), sampler=nano.generation.sampler)
    )
    with comparing.record(nano, [Case(prompt=board)], **settings) as recording:
        found = comparing.measure(recording, other)
    (canvases,) = recording.canvases
    assert len(canvases) == 2 and found.agreement.passes == len(seen) == sum(len(one) - 1 for one in canvases)
    prefix, at = nano.prompt_ids(board), 0
    for canvas in canvases:
        before = None
        for read in canvas[:-1]:
            a, b, temperature = seen[at]
            for model, got in ((nano, a), (other, b)):
                assert nmse(got, model.logits(prefix, read.tolist(), before)) < 1e-10
            before, at = a / temperature, at + 1
        prefix = prefix + canvas[-1].tolist()
    # And the trajectory is the one that A's engine takes.
    drafts = [one for one in nano.stream(board, 60, 3) if isinstance(one, dgemma.Draft)]
    assert len(drafts) == at
    np.testing.assert_array_equal(drafts[-1].tokens, canvases[-1][-1])


def test_a_is_let_go_before_b_is_loaded(monkeypatch: Any) -> None:
    engines: list[weakref.ref[Any]] = []
    whole = comparing.load

    def load(*args: Any, **options: Any) -> DiffusionGemma:
        assert all(one() is None for one in engines), "two models at once"
        model = whole(*args, **options)
        engines.append(weakref.ref(model.engine))
        return model

    monkeypatch.setattr(comparing, "load", load)
    dgemma.compare("nano", "nano", [next(iter(BOARDS))], max_new_tokens=48, **WAYS)
    assert len(engines) == 2


# ---- Figures --------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    b = np.log(np.array([[0.125, 0.625, 0.25], [0.1, 0.1, 0.8]], np.float32))
    sums = Agreeing()
    sums.add(a, b, 1.0)
    found = sums.result()
    assert found.top1 == 0.5 and found.max_error == pytest.approx(math.log(4))
    assert found.nmse == pytest.approx(nmse(b, a))
    assert found.kl == pytest.approx((0.5 * math.log(4) + 0.25 * math.log(0.4)) / 2, rel=1e-6)
    for got, x in ((found.entropy_a, a), (found.entropy_b, b)):
        assert got == pytest.approx(-float((np.exp(x) * x).sum()) / 2, rel=1e-6)
    hot = Agreeing()
    hot.add(a, b, 2.0)
    assert hot.result().entropy_a > found.entropy_a and hot.result().kl < found.kl
    broken = Agreeing()
    broken.add(a, np.where(b < -2, np.nan, b), 1.0)
    assert all(math.isnan(value) for value in (broken.result().nmse, broken.result().max_error, broken.result().kl))


def test_intervals() -> None:
    def outcomes(steps: list[int], solved: list[bool | None]) -> list[Outcome]:
        return [Outcome(tokens=(n,), steps=n, canvases=1, solved=s) for n, s in zip(steps, solved, strict=True)]

    a = outcomes([4, 6, 5, 5] * 50, [True, True, False, None] * 50)
    b = outcomes([5, 8, 5, 6] * 50, [True, False, True, None] * 50)
    found = tally("x", a, b)
    assert (found.steps_a, found.steps_b, found.steps_change.value) == (5, 6, 1)
    assert found.steps_change.within == pytest.approx(1.96 * np.std([1, 2, 0, 1] * 50, ddof=1) / math.sqrt(200))
    assert (found.answers, found.solved_a, found.solved_b, found.only_a, found.only_b) == (150, 100, 100, 50, 50)
    change = found.rate_change
    assert change is not None and change.value == 0 and change.within == pytest.approx(1.96 * 0.0664, rel=0.02)
    alone = tally("", a[:1], b[:1])  # one pair has no spread
    assert alone.steps_change.within is None and alone.rate_change is not None and alone.rate_change.within is None
    # Prompts that take several canvases count by canvas.
    long = [Outcome(tokens=(), steps=30, canvases=3, solved=None), *a[3:4]]
    assert tally("", long, long).steps_a == 35 / 4 and tally("", long, long).rate_change is None


# ---- Prompts --------------------------------------------------------------------------------------------------


def test_prompt_files() -> None:
    assert read_prompts("one\r\n\n two \n", "f") == [Case(prompt="one"), Case(prompt=" two ")]
    lines = '{"prompt": "a\\nb", "answer": "c", "group": "g"}\n\n{"prompt": [1, 2]}\n'
    assert read_prompts(lines, "f") == [Case(prompt="a\nb", answer="c", group="g"), Case(prompt=[1, 2])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("f: no prompts",)),
        ("\n \n", ("f: no prompts",)),
        ('{"prompt": "a"}\nb', ("f: line 2 is not JSON",)),
        ('{"prompt": "a"}\n3', ("f: line 2 is no JSON object",)),
        ('{"prompt": "a", "anwser": "b"}', ("f: line 1: unknown key 'anwser'", "answer")),
        ('{"answer": "a"}', ("f: line 1: no prompt",)),
        ('{"prompt": ""}', ("f: line 1: no prompt",)),
        ('{"prompt": "a", "answer": 3}', ("f: line 1: answer is 3, expected text",)),
    ],
)
def test_prompt_files_that_are_none(text: str, words: tuple[str, ...]) -> None:
    with says(*words):
        read_prompts(text, "f")


# ---- What cannot be compared ----------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    tiny = tiny_checkpoint(tmp_path)
    short = tiny_checkpoint(tmp_path, name="short", canvas_length=8)
    other = tiny_checkpoint(tmp_path, name="other", vocab_size=271)
    monkeypatch.chdir(tmp_path)  # an error's line has no room for every folder's name
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "load", lambda *a, **k: pytest.fail("loaded"))
        for b, words in (
            ("none", ("none", "no model")),
            (short, ("a canvas of 16 tokens, and of 8",)),
            (other, ("a vocabulary of 272 tokens, and of 271",)),
        ):
            with says(*words):
                dgemma.compare(tiny, b, ["x"])
        with says("no prompts"):
            dgemma.compare(tiny, tiny, [])
        with says("unknown key 'question'"):
            dgemma.compare(tiny, tiny, [{"question": "x"}])
    with says("prompt 1", "others to", "templates differ"):
        dgemma.compare("nano", tiny_checkpoint(tmp_path, name="strange", canvas_length=48), ["x"], max_new_tokens=1)
    with says("prompt 2 is empty"):
        dgemma.compare(tiny, tiny, [[5], []])
    (tiny / "tokenizer.json").unlink()
    with says("no tokenizer.json"):
        dgemma.compare(tiny, tiny, [{"prompt": [5, 6], "answer": "x"}], max_new_tokens=4)
    assert dgemma.compare(tiny, tiny, [[5, 6]], max_new_tokens=4).total.same == 1


def test_both_run_with_the_settings_of_a(tmp_path: Path) -> None:
    a, b = (tiny_checkpoint(tmp_path, name=name) for name in "ab")
    edit_json(b / "generation_config.json", max_denoising_steps=2, eos_token_id=list(range(250)))
    found = dgemma.compare(a, b, [[5, 6], [7]], max_new_tokens=16)
    assert found.total.same == 2 and found.total.steps_a == found.total.steps_b > 2


# ---- The command ----------------------------------------------------------------------------------------------


def run(*args: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, args)], input=stdin, prog_name="dgemma")


@pytest.fixture
def without_work(monkeypatch: Any) -> list[Any]:
    """The command with figures that are at hand; returns what it was asked."""
    asked: list[Any] = []
    sums = Agreeing()
    sums.add(np.float32([[1, 2]]), np.float32([[1, 3]]), 1.0)
    sides = [comparing.Side(name=n, backend="torch", device="cpu", dtype="float32", bytes=2_000_000, bits_per_weight=8)
             for n in ("one", "two")]  # fmt: skip
    outcomes = [[Outcome(tokens=(1,), steps=n + i, canvases=1, solved=n == 2) for i in (1, 2)] for n in (2, 3)]
    total = tally("", *outcomes)

    def compare(a: str, b: str, cases: list[Case], **options: Any) -> Comparison:
        asked.append((a, b, cases, options))
        options["progress"]("A, one", 0, 2)
        return Comparison(a=sides[0], b=sides[1], agreement=sums.result(), total=total, groups=(total, total))

    monkeypatch.setattr(comparing, "compare", compare)
    return asked


def test_the_command_says_every_figure(without_work: list[Any], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x\ny\n")
    result = run("one", "two", "--prompts", tmp_path / "p.txt", "-p", "z", "-n", 9, "--seed", 4, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    ((a, b, cases, options),) = without_work
    assert (a, b, [case.prompt for case in cases]) == ("one", "two", ["z", "x", "y"])
    assert (options["max_new_tokens"], options["seed"], options["dtype"]) == (9, 4, "float32")
    for words in ("one", "8.00 bits", "3.50", "4.50", "+1.00", "2 (100.0%)", "0 (0.0%)", "-100.0 ±", "0.2,", "100.00%"):
        assert words in result.stdout, words
    assert "\x1b" not in result.stdout and max(map(len, result.stdout.splitlines())) < 120
    result = run("one", "two", "--prompts", "-", "--json", stdin='{"prompt": "x"}\n')
    found = json.loads(result.stdout)
    assert found["agreement"]["nmse"] == 0.2 and found["total"]["steps_b"] == 4.5 and len(found["groups"]) == 2


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "no prompts: give --prompts FILE"),
        (["-p", " "], 2, "a prompt is empty"),
        (["--prompts", "absent"], 1, "absent: no such file"),
        (["--prompts", "empty"], 1, "empty: no prompts"),
        (["--prompts", "latin"], 1, "latin: not UTF-8"),
        (["--prompts", "."], 1, "not a regular file, but a folder"),
        (["--prompts", "pipe"], 1, "not a regular file, but a pipe"),
        (["--prompts", "zero"], 1, "not a regular file, but a device"),
        (["--prompts", "huge"], 1, "expected at most"),
        (["--prompts", b"\xff.txt"], 1, "?.txt: no such file"),
    ],
)
def test_errors_of_the_command_are_one_line(
    without_work: list[Any], tmp_path: Path, monkeypatch: Any, args: list[Any], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10 << 30)
    result = run("one", "two", *map(os.fsdecode, args))
    assert result.exit_code == code and result.stdout == "" and not without_work
    assert result.stderr.startswith("dgemma: error: ") and words in result.stderr and result.stderr.count("\n") == 1


def test_a_broken_model_is_refused_by_name(nano: DiffusionGemma, damaged: Path, tmp_path: Path) -> None:
    broken = dgemma.convert(damaged, tmp_path / "broken", "bf16").path
    (broken / "model.safetensors.index.json").unlink()
    (broken / "model-00001-of-00001.safetensors").rename(broken / "model.safetensors")
    rewrite(broken, lambda tensors: tensors["model.decoder.norm.weight"].__setitem__(slice(None), np.nan))
    result = run("nano", broken, "-p", next(iter(BOARDS)), "-n", 1, "--json", "--backend", "torch")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'model.decoder.norm.weight' holds NaN or infinity" in result.stderr and result.stderr.count("\n") == 1


def test_figures_that_are_no_numbers_are_valid_json() -> None:
    given = {"nmse": float("nan"), "kl": [float("inf"), -float("inf"), 1.5], "n": 3}
    assert json.loads(json.dumps(jsonable(given), allow_nan=False)) == {"nmse": None, "kl": [None, None, 1.5], "n": 3}
