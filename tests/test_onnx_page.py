"""The random numbers of docs/onnx.md: an implementation from the page alone, and what the page's loop makes of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.core.random import step_noise
from tiny import tiny_checkpoint

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, hidden_size=64, intermediate_size=64, moe_intermediate_size=64)


def test_the_random_numbers_of_the_documentation() -> None:
    """Its 20 lines, written without NumPy, draw what `core/random.py` draws, and its example is one of them."""
    page = (DOCS / "onnx.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.splitlines()) <= 20 and "import" not in code
    written: dict[str, Any] = {}
    exec(code, written)
    for seed, canvas, step, length, vocab in (
        (0, 0, 0, 16, 272), (1, 2, 3, 7, 600), (2**64 - 1, 2**31, 48, 256, 262_144), (2**63 + 9, 5, 1, 1, 2**31 - 1),
    ):  # fmt: skip
        uniform, noise = written["draws"](seed, canvas, step, length, vocab)
        want = step_noise(seed=seed, canvas=canvas, step=step, length=length, vocab_size=vocab)
        np.testing.assert_array_equal(np.float32(uniform), want[0])
        np.testing.assert_array_equal(noise, want[1])
    example = re.search(r"`philox\(1, 2, 3, 2\)` is `(.*?)`", page)
    assert example and eval(example[1]) == written["philox"](1, 2, 3, 2)


def test_the_page_gives_the_tokens_of_a_seed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop over its random numbers, with other settings too: what `generate` writes."""
    page = (DOCS / "onnx.md").read_text()
    loop, numbers = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    dgemma.export(source, source.parent / "out", standalone=True)
    prompt, model = list(range(20, 31)), dgemma.load(source, backend="onnx")
    monkeypatch.setattr(sys, "argv", ["loop", str(source.parent / "out"), ""])
    for stability, confidence in ((0, 1.0), (0, 9.0), (1, 9.0), (2, 9.0)):
        written: dict[str, Any] = {}
        exec(numbers, written)
        exec(loop[: loop.index("prompt = ")], written)
        written["rules"] |= {"stability": stability, "confidence": confidence}
        written["random"] = Drawn(written["draws"], seed=7)
        ids, at, cache, answer = np.array([prompt]), 0, written["cache"], []
        for canvas in range(2):
            written["random"].begin(canvas)
            cache, at = written["read"](cache, ids, at), at + ids.shape[1]
            ids = written["settle"](cache, at)
            answer += ids[0].tolist()
        want = model.generate(prompt, 32, 7, eos=(), stability=stability, confidence=confidence)
        assert tuple(answer) == want.token_ids, (stability, confidence)


class Drawn:
    """Stands where the loop has a generator of NumPy's, and gives out a seed's numbers as it asks for them."""

    def __init__(self, draws: Any, seed: int) -> None:
        self._draws, self._seed = draws, seed

    def begin(self, canvas: int) -> None:
        self._canvas, self._step = canvas, 0

    def integers(self, vocab: int, size: tuple[int, int]) -> np.ndarray:
        return np.array([self._draws(self._seed, self._canvas, self._step, size[1], vocab)[1]])

    def random(self, size: tuple[int, int], dtype: Any) -> np.ndarray:
        self._step += 1  # a pass asks for uniforms first
        return np.array([self._draws(self._seed, self._canvas, self._step, size[1], 1)[0]], dtype)
