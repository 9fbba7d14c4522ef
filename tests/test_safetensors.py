"""The file format: views without copies, a writer that the library reads, and every broken header refused."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dgemma.checkpoints import safetensors
from said import says


def put(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def test_tensors_are_writable_views_of_one_map(tmp_path: Path) -> None:
    path = put(tmp_path / "x", {"a": entry(), "b": entry("BF16", [2, 1], [8, 12])}, bytes(range(12)))
    file = safetensors.SafetensorsFile.open(path)
    a, b = file.tensor("a"), file.tensor("b")
    assert a.base is not None and a.flags.writeable and b.dtype == ml_dtypes.bfloat16 and b.shape == (2, 1)
    assert a.tobytes() + b.tobytes() == bytes(range(12))
    a[:] = 0
    assert path.read_bytes()[-12:] == bytes(range(12))  # the file is never written


def test_unaligned_tensors_are_read_right(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}
    file = safetensors.SafetensorsFile.open(put(tmp_path / "x", header, b"\1" + np.float32(2.5).tobytes()))
    assert file.tensor("b").tolist() == [2.5] and file.tensor("b").flags.aligned


@pytest.mark.parametrize(
    "name", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
)
def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path: Path, name: str) -> None:
    from safetensors import numpy as library

    array = np.arange(6).reshape(2, 3).astype(safetensors.DTYPES[name])
    tensors = {"x": array, "y.T": array.T, "empty": array[:0], "scalar": array[0, 1]}
    safetensors.write(tmp_path / "w", tensors, {"format": "pt"})
    file = safetensors.SafetensorsFile.open(tmp_path / "w")
    theirs = library.load_file(tmp_path / "w") if name != "BF16" else {}
    for key, value in tensors.items():
        assert file.entries[key].dtype == name
        assert file.tensor(key).shape == value.shape and np.array_equal(file.tensor(key), value)
        assert not theirs or np.array_equal(theirs[key], value)
    assert file.metadata == {"format": "pt"} and not list(tmp_path.glob("*.partial"))
    with says("complex128"):
        safetensors.write(tmp_path / "w", {"x": array.astype(complex)})


def test_nothing_is_written_through_links(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0")
    (tmp_path / "canary").write_bytes(b"mine")
    tensors = {"x": np.ones(3, np.float32)}
    for name in ("w", "w.partial", ".dgemma-0.partial"):
        (tmp_path / name).symlink_to(tmp_path / "canary")
        with says("File exists" if name.startswith(".") else "is a link") if name != "w.partial" else nullcontext():
            safetensors.write(tmp_path / "w", tensors)
        (tmp_path / "w").unlink(missing_ok=True)
        assert (tmp_path / "canary").read_bytes() == b"mine"
    (tmp_path / ".dgemma-0.partial").unlink()
    safetensors.write(tmp_path / "w", tensors)
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "canary").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"canary", "w", "w.partial"}


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"old")
    code = f"""
import resource, numpy as np
from dgemma.checkpoints import safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    safetensors.write({str(tmp_path / "w")!r}, {{"x": np.ones(9999)}})
except ValueError as error:
    print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("DgemmaError") and "cannot be written" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w"] and (tmp_path / "w").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry()}, 7, ["truncated", "download"]),
        ({"a": entry()}, 9, ["1 bytes after"]),
        ({"a": entry(), "b": entry()}, 16, ["overlaps"]),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, ["'b'", "overlaps"]),
        ({"a": entry(offsets=[4, 12])}, 12, ["hole"]),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, ["'b'", "hole"]),
        ({"a": entry(shape=[3])}, 8, ["8 bytes", "12"]),
        ({"a": entry(shape=[1])}, 8, ["8 bytes", "4"]),
        ({"a": entry(dtype="F33")}, 8, ["dtype", "F33"]),
        ({"a": entry(dtype=[])}, 8, ["dtype"]),
        ({"a": entry(offsets=[8, 0])}, 8, ["data_offsets"]),
        ({"a": entry(offsets=[-8, 0])}, 8, ["data_offsets"]),
        ({"a": entry(offsets=[0, 8, 8])}, 8, ["data_offsets"]),
        ({"a": entry(offsets=[0, 8.0])}, 8, ["data_offsets"]),
        ({"a": entry(offsets=[False, 8])}, 8, ["data_offsets"]),
        ({"a": entry(shape=2)}, 8, ["shape"]),
        ({"a": entry(shape=[True, 2])}, 8, ["shape"]),
        ({"a": entry(shape=[1 << 61, 8], offsets=[0, 0])}, 0, ["shape"]),
        ({"a": entry(shape=[0, 1 << 61, 8], offsets=[0, 0])}, 0, ["shape"]),
        ({"a": entry(shape=[1] * 99 + [2])}, 8, ["shape"]),
        ({"a": entry(extra=1)}, 8, ["'a'", "exactly"]),
        ({"a": {"dtype": "F32"}}, 8, ["'a'", "exactly"]),
        ({"a": 3}, 8, ["'a'", "exactly"]),
        ({"__metadata__": {"a": 1}}, 0, ["__metadata__"]),
        ({"__metadata__": []}, 0, ["__metadata__"]),
        (b'{"a":1,"a":1}', 0, ["'a'", "twice"]),
        (b'{"__metadata__":{"a":"","a":""}}', 0, ["'a'", "twice"]),
        (b'{"a":NaN}', 0, ["NaN"]),
        (b'{"a":' + b"[" * 100_000, 0, ["JSON"]),
        (b'{"a":' + b"9" * 5000 + b"}", 0, ["JSON"]),
        (b'{"\xff":1}', 0, ["JSON"]),
        (b'[{"a":1}]', 0, ["object"]),
        (b' {"a":1}', 0, ["object"]),
        (b"", 0, ["object"]),
    ],
)  # fmt: skip
def test_headers_against_the_format(tmp_path: Path, header: Any, data: int, words: list[str]) -> None:
    with says("x.safetensors", *words):
        safetensors.SafetensorsFile.open(put(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes", "download"]),
        (b"\0" * 7, ["7 bytes", "download"]),
        (b"\xff" * 8, ["header of 18446744073709551615"]),
        ((1 << 63).to_bytes(8, "little") + b"{}", ["header of 9223372036854775808"]),
        ((100_000_001).to_bytes(8, "little"), ["header of 100000001"]),
        ((50).to_bytes(8, "little") + b"{}", ["truncated"]),
        (b"<!DOCTYPE html>" * 10, ["not a safetensors file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ["git-lfs pointer", "git lfs pull"]),
    ],
)
def test_lengths_against_the_format(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with says("x.safetensors", *words):
        safetensors.SafetensorsFile.open(tmp_path / "x.safetensors")


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = put(tmp_path / "x.safetensors", {"a": entry()}, bytes(8))
    file = safetensors.SafetensorsFile.open(path)
    with path.open("r+b") as handle:
        handle.truncate(file.size - 8)
    with says("x.safetensors", "changed"):
        file.tensor("a")
