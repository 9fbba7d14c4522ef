"""Exported graphs belong to their config, to the layout of their weights, and to each other: changes are noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import dgemma
from dgemma.checkpoints import safetensors
from dgemma.checkpoints.safetensors import SafetensorsFile
from dgemma.export.manifest import NAME, stamp
from said import says
from tiny import edit_json, rewrite, shard, tiny_checkpoint

PROMPT = list(range(20, 30))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with graphs beside it; another of the same in fp16, and one with logits."""
    root = tmp_path_factory.mktemp("bound")
    for name, options in {"plain": {}, "fp16": dict(fp16=True), "logits": dict(logits=True)}.items():
        dgemma.export(tiny_checkpoint(root, name=name), **options)
    dgemma.export(root / "plain", root / "alone", standalone=True)
    even = tiny_checkpoint(root, name="even", hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    dgemma.convert(even, root / "4bit", workers=1)
    dgemma.export(root / "4bit")
    return root


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported / "plain", tmp_path / "copy"))


def tokens(folder: Path, backend: str) -> tuple[int, ...]:
    return dgemma.load(folder, backend=backend, dtype="float32").generate(PROMPT, 20, eos=()).token_ids


def text_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        data["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "layers": text_config(sliding_window=10),
        "norm_eps": text_config(rms_norm_eps=1e-5),
        "softcap": text_config(final_logit_softcapping=20.0),
        "experts_per_token": text_config(top_k_experts=1),
        "layers are": text_config(
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            }
        ),
        "layers are not": text_config(
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            }
        ),
        "canvas_length is 16": lambda folder: edit_json(folder / "config.json", canvas_length=8),
    }.items(),
)
def test_a_config_that_was_edited(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    change(folder)
    with says(NAME, name, "not as in config.json; export again"):
        dgemma.load(folder, backend="onnx")
    dgemma.load(folder, backend="torch")  # to which graphs are nothing


def test_what_no_graph_depends_on_may_be_edited(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=7)
    edit_json(folder / "generation_config.json", t_max=0.7, eos_token_id=None)
    text_config(max_position_embeddings=400)(folder)
    entry = SafetensorsFile.open(folder / "model.safetensors").entries["model.decoder.norm.weight"]
    with (folder / "model.safetensors").open("r+b") as file:  # another value, in the same place
        file.seek(entry.start)
        file.write(np.float32([0.5, 2.0, 1.5]).tobytes())
    assert tokens(folder, "onnx") == tokens(folder, "torch")


def reordered(folder: Path) -> None:
    """Write two tensors of one shape in each other's places: a header of the same length, a file of the same size."""
    path = folder / "model.safetensors"
    file = SafetensorsFile.open(path)
    a, b = (f"model.decoder.layers.{i}.mlp.gate_proj.weight" for i in (0, 1))
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = (file.tensor(name).tobytes() for name in (a, b))
    for name, value in ((a, second), (b, first)):
        start = file.entries[name].start
        data[start : start + len(value)] = value
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header, separators=(",", ":")).encode()
    data[8 : 8 + length] = text + b" " * (length - len(text))
    path.write_bytes(data)


def longer_header(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    file = SafetensorsFile.open(path)
    tensors = {name: file.tensor(name).copy() for name in file.entries}
    safetensors.write(path, tensors, {"format": "pt", "note": "of another tool" * 9})


def narrower(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: one.astype("float16") for name, one in tensors.items()}))


@pytest.mark.parametrize("change", [reordered, longer_header, narrower, shard])
def test_weights_that_were_saved_again(folder: Path, change: Callable[[Path], Any]) -> None:
    before = tokens(folder, "onnx")
    assert before == tokens(folder, "torch")
    change(folder)
    with says(NAME, "is not laid out as when it was exported; export again"):
        dgemma.load(folder, backend="onnx")
    dgemma.export(folder, force=True)
    assert tokens(folder, "onnx") == tokens(folder, "torch")
    assert change is narrower or tokens(folder, "onnx") == before


@pytest.mark.parametrize("name", ["alone", "4bit"])
def test_copies_and_quantized_folders_are_bound_too(exported: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(exported / name, tmp_path / "copy"))
    assert tokens(folder, "onnx") == tokens(folder, "torch")
    longer_header(folder)
    with says(".safetensors' is not laid out as when it was exported"):
        dgemma.load(folder, backend="onnx")
    text_config(rms_norm_eps=1e-4)(folder)
    with says("norm_eps is 1e-06, not as in config.json"):
        dgemma.load(folder, backend="onnx")


def put(name: str, source: str) -> Callable[[Path, Path], Any]:
    return lambda folder, root: shutil.copy(root / source, folder / name)


def edited(folder: Path, _: Path) -> None:
    data = bytearray((folder / "denoise.onnx").read_bytes())
    at = data.index(b"RMSNormalization")
    data[at : at + 3] = b"XYZ"
    (folder / "denoise.onnx").write_bytes(data)


def cut(folder: Path, _: Path) -> None:
    os.truncate(folder / "denoise.onnx", 1000)


def swapped(folder: Path, root: Path) -> None:
    for name, other in (("encode", "denoise"), ("denoise", "encode")):
        shutil.copy(root / "plain" / f"{name}.onnx", folder / f"{other}.onnx")


def pipe(folder: Path, _: Path) -> None:
    (folder / "denoise.onnx").unlink()
    os.mkfifo(folder / "denoise.onnx")


def a_folder(folder: Path, _: Path) -> None:
    (folder / "denoise.onnx").unlink()
    (folder / "denoise.onnx").mkdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("denoise.onnx", "fp16/denoise.onnx"), "not the graph that dgemma-onnx.json was written with; export"),
        (put("denoise.onnx", "logits/denoise.onnx"), "not the graph"),
        (put("encode.onnx", "4bit/encode.onnx"), "encode.onnx: not the graph"),
        (swapped, "not the graph"),
        (edited, "denoise.onnx: not the graph"),
        (cut, "denoise.onnx: not the graph"),
        (pipe, "denoise.onnx: not a regular file"),
        (a_folder, "denoise.onnx: not a regular file"),
        (lambda folder, root: (folder / "encode.onnx").unlink(), "encode.onnx: no such file"),
        (put(NAME, f"4bit/{NAME}"), "hidden_size is 64, not as in config.json"),
        (put(NAME, f"logits/{NAME}"), "denoise.onnx: not the graph"),
    ],
)  # fmt: skip
def test_graphs_of_another_export(exported: Path, folder: Path, change: Any, words: str) -> None:
    change(folder, exported)
    with says(words):
        dgemma.load(folder, backend="onnx")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(version=1), "its graphs are of manifest version 1, this dgemma reads 3; export again, with --force"),
        (dict(version=2), "its graphs are of manifest version 2, this dgemma reads 3; export again, with --force"),
        (dict(version="2"), "not a dgemma-onnx manifest; export again"),
        (dict(version=True), "not a dgemma-onnx manifest"),
        (dict(bound=None), "does not say what its graphs belong to; export again"),
        (dict(bound={"weights": {}}), "does not say what its graphs belong to"),
        (dict(dtype="float16"), "dtype is not what its graphs were written in; export again"),
        (dict(graphs=7), ""),
    ],
)
def test_a_manifest_that_was_edited(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(folder / NAME, **changes)
    if words:
        with says(NAME, words):
            dgemma.load(folder, backend="onnx")
    else:  # it then names no graphs, and they are written when the folder is loaded
        assert tokens(folder, "onnx") == tokens(folder, "torch")


@pytest.mark.parametrize("target", ["/nowhere/at/all", "/proc/self/environ", "config.json"])
def test_a_manifest_that_is_a_link(folder: Path, target: str) -> None:
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(target)
    with says(NAME):
        dgemma.load(folder, backend="onnx")


def remade(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Edit a graph, and make the manifest say that it was so."""
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    change(model)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    about = json.loads((folder / NAME).read_text())
    about["bound"]["graphs"][name] = stamp((folder / f"{name}.onnx").read_bytes())
    (folder / NAME).write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("location", "offset", "words"),
    [
        ("../other.safetensors", 0, "it is no weight file of the folder; export again"),
        ("/etc/passwd", 0, "it is no weight file of the folder"),
        ("config.json", 0, "it is no weight file of the folder"),
        ("a\0b", 0, "it is no weight file of the folder"),
        ("x" * 5000, 0, "it is no weight file of the folder"),
        ("model.safetensors", 1 << 40, "a graph wants bytes behind its end; export again"),
    ],
)
def test_a_graph_that_names_other_bytes(folder: Path, location: str, offset: int, words: str) -> None:
    """One that was made to, with a manifest to match."""
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")

    def change(model: Any) -> None:
        one = next(one for one in model.graph.initializer if one.external_data)
        for entry in one.external_data:
            entry.value = {"location": location, "offset": str(offset)}.get(entry.key, entry.value)

    remade(folder, "denoise", change)
    with says(words):
        dgemma.load(folder, backend="onnx", device="cpu")


@pytest.mark.parametrize("kind", ["UNDEFINED", "STRING", "BOOL", "UINT2", "UINT4", "FLOAT8E8M0", "COMPLEX64"])
def test_a_graph_that_wants_weights_in_another_type(folder: Path, kind: str) -> None:
    def change(model: Any) -> None:
        next(one for one in model.graph.initializer if one.external_data).data_type = number

    number = dict(onnx.TensorProto.DataType.items()).get(kind, 25)
    remade(folder, "denoise", change)
    with says(kind, "which no weight is in; export again"):
        dgemma.load(folder, backend="onnx", device="cpu")


@pytest.mark.parametrize(
    ("name", "output"), [("encode", "present.1.value"), ("denoise", "entropy"), ("denoise", "next_canvas")]
)
def test_a_graph_that_lacks_an_output(folder: Path, name: str, output: str) -> None:
    def change(model: Any) -> None:
        model.graph.output.remove(next(one for one in model.graph.output if one.name == output))

    remade(folder, name, change)
    with says("onnxruntime", output):
        tokens(folder, "onnx")
