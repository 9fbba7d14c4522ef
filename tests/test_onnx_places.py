"""Weights at any place of a file, as MLX writes them: numbers at odd addresses, widths in no order."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import dgemma
from dgemma.checkpoints.safetensors import DTYPES, SafetensorsFile
from dgemma.tools.verify_onnx import verify
from said import says
from tiny import tiny_checkpoint

SIZES = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float checkpoints in two widths and two quantized ones, as they are written here: aligned."""
    root = tmp_path_factory.mktemp("places")
    for dtype in ("float32", "bfloat16"):
        tiny_checkpoint(root, name=dtype, dtype=dtype, **SIZES)
    for recipe in ("4bit-mlx", "8bit"):
        dgemma.convert(root / "bfloat16", root / recipe, recipe=recipe, workers=1)
    return root


def moved(folder: Path, to: Path, shift: int) -> Path:
    """Copy a folder with its tensors in the order of their names, from an address of that remainder by 16 on."""
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (to / path.name).write_bytes(path.read_bytes())
            continue
        file = SafetensorsFile.open(path)
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        parts, end = [], 0
        for name in sorted(file.entries):
            data = file.tensor(name).tobytes()
            header[name] = {
                "dtype": file.entries[name].dtype, "shape": file.entries[name].shape,
                "data_offsets": [end, end + len(data)],
            }  # fmt: skip
            parts.append(data)
            end += len(data)
        text = json.dumps(header).encode()
        text += b" " * ((shift - 8 - len(text)) % 16)
        (to / path.name).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    return to


def misplaced(folder: Path) -> int:
    files = [SafetensorsFile.open(path) for path in folder.glob("*.safetensors")]
    return sum(one.start % DTYPES[one.dtype].itemsize > 0 for file in files for one in file.entries.values())


@pytest.mark.parametrize("shift", [0, 1, 2, 7])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "4bit-mlx", "8bit"])
def test_weights_at_any_address(root: Path, tmp_path: Path, name: str, shift: int) -> None:
    folder = moved(root / name, tmp_path / name, shift)
    assert misplaced(folder) or shift in (0, 2)
    ids = list(range(20, 40))
    want, got = (
        dgemma.load(one, backend=backend, dtype="float32")
        for one, backend in ((root / name, "torch"), (folder, "onnx"))
    )
    assert got.generate(ids, 24, eos=(), steps=3).token_ids == want.generate(ids, 24, eos=(), steps=3).token_ids
    canvas = list(range(60, 76))
    difference = got.logits(ids, canvas) - want.logits(ids, canvas)
    assert np.square(difference).sum() < 1e-10 * np.square(want.logits(ids, canvas)).sum()


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("name", ["float32", "4bit-mlx"])
def test_exports_of_them_work_or_say_how(root: Path, tmp_path: Path, name: str, shift: int) -> None:
    folder = moved(root / name, tmp_path / name, shift)
    if name == "4bit-mlx" and shift == 2:  # words are read as bytes, and scales lie well
        dgemma.export(folder)
        assert max(verify(folder, folder).values()) < 1e-3
        return
    for out in (None, tmp_path / "out"):
        with says("does not lie at a multiple of", "give --standalone and --out"):
            dgemma.export(folder, out)
    assert not (tmp_path / "out").exists()
    dgemma.export(folder, tmp_path / "out", standalone=True)
    assert misplaced(tmp_path / "out") == 0
    onnx.checker.check_model(tmp_path / "out" / "denoise.onnx", full_check=True)
    assert max(verify(tmp_path / "out", folder).values()) < 1e-3
