"""The checkpoint that ships: it solves boards, and every backend writes the same tokens to the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from dgemma.backends.numpy import NumpyOps
from dgemma.checkpoints.checkpoint import Checkpoint, resolve
from dgemma.core.model import denoise, encode, new_cache
from dgemma.core.ops import Ops
from dgemma.core.parts import Model
from law import assert_low_precision
from under_test import LOW_PRECISION_BACKENDS, build, make_ops

ROOT = Path(__file__).parents[1]
SUDOKU = ROOT / "examples" / "sudoku"

# One solution each.
BOARDS = (
    ".3.1\n.2..\n....\n...4",
    "....\n1...\n.4.2\n...4",
    "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425",
    "....1.\n.4..35\n......\n2.64..\n5..16.\n..1...",
)


@pytest.fixture(scope="module")
def nano() -> DiffusionGemma:
    return dgemma.load("nano", backend="torch")


@pytest.fixture(scope="module")
def tensors() -> Checkpoint:
    return Checkpoint.open(resolve("nano"))


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_generations_are_token_identical(nano: DiffusionGemma, backend: str) -> None:
    other = dgemma.load("nano", backend=backend)
    assert other.dtype == nano.dtype == "float32"
    for seed, board in enumerate(BOARDS):
        want = nano.generate(board, seed=seed)
        got = other.generate(board, seed=seed)
        assert (got.token_ids, got.finish_reason, got.stats.steps) == (
            want.token_ids, want.finish_reason, want.stats.steps,
        )  # fmt: skip


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_is_its_rows_however_its_lines_end(nano: DiffusionGemma, board: str) -> None:
    for end in ("\r\n", "\r", "", " "):
        assert nano.prompt_ids(board.replace("\n", end)) == nano.prompt_ids(board)
    assert nano.prompt_ids(f"\r\n{board}\r\n") == nano.prompt_ids(board)


def logits(ops: Ops, model: Model, prompt: list[int], canvas: np.ndarray, soft: np.ndarray) -> np.ndarray:
    cache = new_cache(ops, model.config, slots=1, capacity=len(prompt), scratch=max(len(prompt), len(canvas)))
    cache = encode(ops, model, cache, ops.asarray(np.asarray([prompt], np.int32)))
    x = denoise(ops, model, cache, ops.asarray(canvas[None].astype(np.int32)), ops.asarray(soft[None], ops.dtype))
    return ops.to_numpy(ops.logits(x, model.embed_tokens, model.config.softcap))[0]


@pytest.mark.parametrize("backend", LOW_PRECISION_BACKENDS)
def test_bfloat16_is_within_the_law(nano: DiffusionGemma, tensors: Checkpoint, backend: str) -> None:
    rng = np.random.default_rng(0)
    prompt = nano.tokenizer.render([{"role": "user", "content": BOARDS[2]}])
    canvas = rng.integers(0, nano.config.vocab_size, nano.config.canvas_length)
    soft = rng.normal(0, 0.1, (nano.config.canvas_length, nano.config.hidden_size)).astype(np.float32)
    exact, rounded, got = (
        logits(ops, build(ops, tensors.config, tensors.tensor), prompt, canvas, soft)
        for ops in (NumpyOps("float64"), NumpyOps("bfloat16"), make_ops(backend, "bfloat16"))
    )
    assert_low_precision(got, rounded, exact)


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_may_stand_in_one_line(nano: DiffusionGemma, board: str) -> None:
    want = nano.tokenizer.render([{"role": "user", "content": board}])
    for spelling in (board.replace("\n", " "), board.replace("\n", "")):
        assert nano.tokenizer.render([{"role": "user", "content": spelling}]) == want
    assert nano.tokenizer.render([{"role": "user", "content": "1 2 three"}]) != want


def test_the_example_solves_and_checks_a_board() -> None:
    run = subprocess.run(
        [sys.executable, str(SUDOKU / "solve.py"), BOARDS[2].replace("\n", "")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = run.stdout.split()
    assert len(rows) == 6 and all(sorted(row) == list("123456") for row in rows)
    assert "correct" in run.stderr


def test_it_is_a_few_megabytes_with_its_card() -> None:
    folder = resolve("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 << 20
    card = (folder / "README.md").read_text()
    for said in ("seed", "steps", "givens", "held-out", "Prompt format", "Limits"):
        assert said.lower() in card.lower(), said
