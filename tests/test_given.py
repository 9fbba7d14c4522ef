"""What callers may give that is nothing of the kind, files that change under a model, and what a model says it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from dgemma.checkpoints import loading, safetensors
from dgemma.checkpoints.safetensors import SafetensorsFile
from said import says
from tiny import tiny_checkpoint

NONSENSE = {"None": None, "an integer": 5, "bytes": b"nano", "an object": object(), "a list": ["nano"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return dgemma.load(folder, backend="torch")


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "load": lambda value, path: dgemma.load(value),
    "convert": lambda value, path: dgemma.convert(value, path / "out"),
    "convert to": lambda value, path: dgemma.convert(path, value),
    "export": lambda value, path: dgemma.export(value, path / "out"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", NONSENSE)
def test_what_is_no_path_is_refused_in_one_line(call: str, value: str, folder: Path) -> None:
    with says("expected"):
        CALLS[call](NONSENSE[value], folder)


@pytest.mark.parametrize("prompt", [None, 5, b"x", object(), [b"x"], [None], [[1], [2, 3]], {1: 2}, [1.5], {3}])
def test_what_is_no_prompt_is_refused_in_one_line(model: DiffusionGemma, prompt: Any) -> None:
    with says("the prompt", "expected"):
        model.stream(prompt)
    with says("the canvas", "expected"):
        model.logits([5], prompt)


@pytest.mark.parametrize("logits", ["x", b"x", [[1.0], [2.0, 3.0]], 5, object(), np.zeros((2, 3))])
def test_what_are_no_logits_is_refused_in_one_line(model: DiffusionGemma, logits: Any) -> None:
    with says("previous_logits", "expected floats"):
        model.logits([5], [6, 7], logits)


# ---- Files that change ------------------------------------------------------------------------------------------

SHRINKS = """
import os, sys, dgemma
model = dgemma.load(sys.argv[1], backend=sys.argv[2])
want = model.generate([5, 6, 7], 16, steps=2, eos=()).token_ids
os.truncate(sys.argv[1] + "/model.safetensors", 100)
print(len(want) == 16 and model.generate([5, 6, 7], 16, steps=2, eos=()).token_ids == want)
"""


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx", "mlx"])
def test_a_small_model_outlives_its_file(backend: str, tmp_path: Path) -> None:
    """Where it is mapped, reading beyond the file's end kills the process: SIGBUS."""
    done = subprocess.run(
        [sys.executable, "-c", SHRINKS, str(tiny_checkpoint(tmp_path)), backend], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx"])
def test_a_large_model_is_refused_once_its_file_has_changed(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "HELD", 0)
    folder = tiny_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    model = dgemma.load(folder, backend=backend)
    want = model.generate([5, 6, 7], 16, steps=2).token_ids
    replaced = tmp_path / "replaced"
    replaced.write_bytes(b"another file of that name")
    kept = tmp_path / "kept"
    os.link(path, kept)
    os.replace(replaced, path)
    assert model.generate([5, 6, 7], 16, steps=2).token_ids == want  # the map is of the old file
    os.utime(kept, (1, 1))
    for ask in (lambda: model.stream([5, 6, 7]), lambda: model.logits([5], [6])):
        with says("model.safetensors", "changed after it was loaded", "load the model again"):
            ask()


def test_a_held_file_is_read_in_pieces_and_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_READ", 100)
    want = {"a": np.arange(1000, dtype=np.float32), "b": np.ones((3, 5), np.float16)}
    safetensors.write(tmp_path / "x.safetensors", want)
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    file.hold()
    for name, array in want.items():
        np.testing.assert_array_equal(file.tensor(name), array)
        assert file.tensor(name).flags.writeable
    other = SafetensorsFile.open(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 200)
    np.testing.assert_array_equal(file.tensor("a"), want["a"])
    with says("x.safetensors", "changed while it was being read"):
        other.hold()


# ---- What they say they are -------------------------------------------------------------------------------------


def test_a_model_and_a_result_say_what_they_are(model: DiffusionGemma) -> None:
    said = repr(model)
    assert said == "<DiffusionGemma 'tiny': 57.6 k parameters, torch on cpu, float32, context 512>", said
    result = model.generate([5, 6, 7], 16, steps=1, eos=())
    assert repr(result).startswith("<Generation ") and repr(result).endswith(": 16 tokens, length>")
    assert repr(result).isprintable() and len(repr(result)) < 400


def test_an_empty_answer_says_that_it_ended_by_itself(model: DiffusionGemma) -> None:
    every = tuple(range(model.config.vocab_size))
    result = model.generate([5, 6, 7], 16, steps=1, eos=every)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "stop")
    assert repr(result) == "<Generation '': 0 tokens, stop>" and result.stats.emitted_tokens == 0


@pytest.mark.parametrize("value", [1, "no", None, b"x", object(), np.array([True])])
def test_what_is_neither_true_nor_false_is_no_flag(model: DiffusionGemma, folder: Path, value: Any) -> None:
    for name in ("thinking", "raw", "specials"):
        with says(f"{name} is", "True or False"):
            model.stream("x", **{name: value})
    for name in ("mlx", "requantize", "force", "verify"):
        with says(f"{name} is", "True or False"):
            dgemma.convert(folder, folder / "out", **{name: value})
    for name in ("unified", "standalone", "fp16", "logits", "cpu", "portable", "verify", "force"):
        with says(f"{name} is", "True or False"):
            dgemma.export(folder, folder / "out", **{name: value})


@pytest.mark.parametrize("value", [3, "x", b"x", object(), [print]])
def test_other_options_of_no_use_are_refused_before_the_work(folder: Path, value: Any) -> None:
    with says("progress is", "expected a function"):
        dgemma.convert(folder, folder / "out", progress=value)
    with says("progress is", "expected a function"):
        dgemma.export(folder, folder / "out", progress=value)
    with says("progress is", "expected a function"):
        dgemma.load(folder, progress=value)
    if value != 3:
        with says("workers is", "expected an integer"):
            dgemma.convert(folder, folder / "out", workers=value)
    if value != "x":
        with says("tokenizer is", "expected a path"):
            dgemma.convert(folder, folder / "out", tokenizer=value)
    assert not (folder / "out").exists()


def test_numpys_truth_is_truth(model: DiffusionGemma) -> None:
    model.stream("x", thinking=np.bool_(True), raw=np.bool_(False)).close()  # type: ignore[arg-type,attr-defined]
