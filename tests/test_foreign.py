"""Folders and files of other makes: one line says what each is, and what it advises is not refused in turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dgemma
from dgemma.checkpoints import safetensors
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.cli import main
from dgemma.cli.fit import describe
from dgemma.convert import convert
from dgemma.core.errors import DgemmaError
from dgemma.tools.inspect import inspect_folder
from published import one_by_one, published
from said import says
from tiny import INDEX, edit_json, rewrite, shard, tiny_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 51600000000\n" % 7
SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


def everywhere(folder: Path, *words: str, convertible: bool = False) -> None:
    """Expect the same of every command that takes a folder."""
    acts: list[Callable[[], Any]] = [
        lambda: dgemma.load(folder), lambda: dgemma.export(folder, folder.parent / "onnx"),
        lambda: dgemma.compare(folder, folder, ["a"]),
    ]  # fmt: skip
    if not convertible:
        acts += [lambda: convert(folder, folder.parent / "out", "bf16", workers=1), lambda: inspect_folder(folder)]
    for act in acts:
        with says(*words):
            act()
    assert not (folder.parent / "out").exists() and not (folder.parent / "onnx").exists()


def only(folder: Path, *names: str, config: bool = False) -> Path:
    """Leave nothing but files of these names, with nothing of use in them."""
    for path in folder.iterdir():
        if not (config and path.suffix in (".json", ".jinja")):
            path.unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["LoRA", "merge_and_unload"]),
        (["adapter_model.bin"], ["LoRA", "merge_and_unload"]),
        (["pytorch_model.bin"], ["pickle", "safetensors"]),
        (["consolidated.00.pth"], ["pickle", "safetensors"]),
        (["encode.onnx", "denoise.onnx"], ["ONNX", "exported from"]),
        (["model.safetensors.incomplete"], ["did not finish", "again"]),
    ],
)
def test_what_a_folder_is_instead(folder: Path, names: list[str], words: list[str], config: bool) -> None:
    everywhere(only(folder, *names, config=config), *words)


@pytest.mark.parametrize("names", [["adapter_model.bin"], ["pytorch_model.bin"], ["a.gguf"], []])
def test_doctor_says_the_same_of_what_has_no_config(folder: Path, names: list[str]) -> None:
    with pytest.raises(DgemmaError) as load:
        dgemma.load(only(folder, *names))
    with says(str(load.value)):
        describe(str(folder))


def test_gguf_where_a_folder_is_wanted(folder: Path) -> None:
    for path in (only(folder, "a.gguf"), folder / "a.gguf"):
        for act in (
            dgemma.load,
            lambda one: dgemma.export(one, folder.parent / "onnx"),
            lambda one: describe(str(one)),
        ):
            with says("GGUF", "`dgemma convert`", "--requantize"):
                act(path)


def test_empty_folders_unfinished_downloads_and_folders_of_folders(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    everywhere(empty, "empty folder", "config.json")
    (empty / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (empty / ".cache" / "huggingface" / "download" / "x.abc.incomplete").touch()
    everywhere(empty, "did not finish", "hf download")
    everywhere(tmp_path, "config.json", "tiny")
    dgemma.load(folder)  # as was advised
    (folder / "config.json").unlink()
    everywhere(folder, "no config.json", "weights")


def test_parts_of_a_download(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    everywhere(folder, "model-00002-of-00003.safetensors", "no such file", "download")
    (folder / INDEX).unlink()
    everywhere(folder, "2 .safetensors files of 3", INDEX)


def test_one_file_with_the_whole_model_under_another_name(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "weights.safetensors")
    everywhere(folder, "1 .safetensors file", "name it model.safetensors")
    (folder / "weights.safetensors").rename(folder / SINGLE)
    dgemma.load(folder)


def test_files_in_place_of_folders(folder: Path, tmp_path: Path) -> None:
    everywhere(folder / SINGLE, "one file of a checkpoint", "tiny")
    (tmp_path / "model.pt").write_bytes(b"x")
    everywhere(tmp_path / "model.pt", "pickle")
    everywhere(folder / "tokenizer.json", "not a folder", "config.json")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_git_lfs_pointers(folder: Path, name: str) -> None:
    (folder / name).write_bytes(LFS)
    with says(name, "git-lfs pointer", "git lfs pull"):
        dgemma.load(folder)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "llama", "diffusion_gemma_text", None])
def test_other_models(folder: Path, kind: Any) -> None:
    data = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    data = {"model_type": kind, "hidden_size": 4} if kind == "llama" else data
    (folder / "config.json").write_text(json.dumps(data))
    if kind is None:  # absent is as good as right: everything else is checked
        dgemma.load(folder)
    else:
        everywhere(folder, "model_type", str(kind), "diffusion_gemma")


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gptq", "awq", "hqq", "quanto", "aqlm", "mystery"])
def test_quantizations_that_nothing_reads(folder: Path, method: str) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    everywhere(folder, method, "not read", "MLX")


@pytest.mark.parametrize("layout", ["modelopt", "nvfp4", "fp8"])
def test_what_is_said_to_be_convertible_is(tmp_path: Path, layout: str) -> None:
    source, _ = published(tmp_path, layout)
    everywhere(source, "dgemma convert", convertible=True)
    convert(source, tmp_path / "made", "bf16", requantize=True, workers=1)
    dgemma.load(tmp_path / "made")


def test_experts_one_by_one_are_convertible(folder: Path, tmp_path: Path) -> None:
    def split(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors |= {f"{one}.weight": value.copy() for one, value in one_by_one(name, tensors.pop(name)).items()}

    want = {name: np.array(Checkpoint.open(folder).tensor(name)) for name in Checkpoint.open(folder).names}
    rewrite(folder, split)
    everywhere(folder, "experts", "dgemma convert", convertible=True)
    made = Checkpoint.open(convert(folder, tmp_path / "made", "bf16", workers=1).path)
    for name, value in want.items():
        got = np.array(made.tensor(name))
        assert np.array_equal(got, value.astype(got.dtype)), name


@pytest.mark.parametrize(
    ("tensor", "word"),
    [("model.decoder.layers.0.mlp.gate_proj.qweight", "GPTQ"),
     ("model.decoder.layers.0.mlp.gate_proj.weight.absmax", "bitsandbytes"),
     ("model.decoder.layers.0.mlp.gate_proj.lora_A.weight", "LoRA"),
     ("model.decoder.layers.0.mlp.gate_proj.scales", "config.json")],
)  # fmt: skip
def test_tensors_that_others_leave(folder: Path, tensor: str, word: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({tensor: np.ones(4, np.float32)}))
    everywhere(folder, "unknown", "gate_proj", word)


def test_an_unfinished_copy_of_a_published_folder_is_not_taken_for_a_whole_one(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    data = (half / SINGLE).read_bytes()
    (half / SINGLE).write_bytes(data[: len(data) // 2])
    everywhere(half, SINGLE, "truncated", "download it again")
    safetensors.write(half / SINGLE, {"a": np.ones(3, np.float32)})
    everywhere(half, "missing")


def test_inspect_says_what_was_ignored(folder: Path) -> None:
    def lines(*options: str) -> str:
        result = CliRunner().invoke(main, ["inspect", str(folder), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    data = json.loads((folder / "config.json").read_text())
    edit_json(
        folder / "config.json", unsloth_version="1", text_config=data["text_config"] | {"num_kv_shared_layers": 0}
    )
    edit_json(folder / "generation_config.json", repetition_penalty=1.0)
    (line,) = (line for line in lines().splitlines() if "ignored" in line)
    assert line.isprintable() and "without effect" in line
    listed = json.loads(lines("--json"))["ignored"]
    assert {"unsloth_version", "text_config.num_kv_shared_layers", "generation_config.repetition_penalty"} <= set(
        listed
    )


@pytest.mark.parametrize("absent", [None, False, 0, [], "", {}])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_quantization_that_is_none(folder: Path, tmp_path: Path, key: str, absent: Any) -> None:
    edit_json(folder / "config.json", **{key: absent})
    dgemma.load(folder, backend="numpy")
    dgemma.convert(folder, tmp_path / "out", recipe="bf16")


def test_a_loop_of_links_is_called_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("other")
    (folder / "other").symlink_to("tokenizer.json")
    with pytest.raises(DgemmaError, match=r"link that leads back to itself|levels of symbolic links"):
        dgemma.load(folder, backend="numpy")
