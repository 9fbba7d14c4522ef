"""Conversion: every recipe on every backend, the same bytes however it went, nothing half-made that looks whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import dgemma
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import Format, QTensor
from dgemma.checkpoints.safetensors import DTYPES
from dgemma.cli import main
from dgemma.convert import convert, encode, job, plan, recipes
from dgemma.convert.meter import Progress
from dgemma.core.config import ModelConfig
from dgemma.tools import inspect
from law import assert_close_f32
from published import IMAGE, MANIFEST, SHARD, floats, hashes, left, read_config
from said import says
from tiny import edit_json, rewrite

GATE = "model.decoder.layers.0.mlp.gate_proj.weight"
DATA = Path(__file__).parent / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return floats(tmp_path)


# ---- Recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlx", [False, True], ids=["", "mlx"])
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_runs_alike_on_every_backend(folder: Path, tmp_path: Path, recipe: str, mlx: bool) -> None:
    out = tmp_path / "out"
    report = convert(folder, out, recipe, mlx=mlx, workers=2)
    assert report.quantized_share == report.wanted_share and not report.fallbacks
    prompt, canvas = list(range(20, 45)), list(range(60, 76))
    results = {}
    for backend in ("numpy", "torch", "mlx"):
        results[backend] = dgemma.load(out, backend=backend, dtype="float32").logits(prompt, canvas)
    for backend in ("torch", "mlx"):
        assert_close_f32(results[backend], results["numpy"], backend)
    want = dgemma.load(folder, backend="numpy", dtype="float32").logits(prompt, canvas)
    drift = np.linalg.norm(results["numpy"] - want) / np.linalg.norm(want)
    assert drift == 0 if recipe == "bf16" else 0 < drift < 0.5


@pytest.mark.parametrize(
    ("recipe", "part", "kind"),
    [
        ("4bit", "experts.gate_up_proj", Format(symmetric=True)),
        ("4bit", "self_attn.q_proj", Format(bits=8, symmetric=True)),
        ("4bit", "router.proj", None),
        ("8bit", "experts.down_proj", Format(bits=8, symmetric=True)),
        ("4bit-mlx", "experts.gate_up_proj", Format(group_size=64)),
        ("4bit-mlx", "router.proj", Format(bits=8, group_size=64)),
        ("nvfp4", "experts.down_proj", Format(mode="nvfp4", group_size=16)),
        ("mxfp8", "mlp.up_proj", Format(mode="mxfp8", bits=8)),
    ],
)
def test_a_recipe_gives_each_part_its_format(folder: Path, tmp_path: Path, recipe: str, part: str, kind: Any) -> None:
    convert(folder, tmp_path / "out", recipe)
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = next(one for one in weights.shapes(checkpoint.config) if f"layers.1.{part}" in one)
    stored = checkpoint.tensor(name)
    assert (stored.format if isinstance(stored, QTensor) else None) == kind
    embedding = checkpoint.tensor("model.decoder.embed_tokens.weight")
    assert isinstance(embedding, QTensor) and embedding.format.bits == 8


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_tensor_is_aligned_to_its_own_width(folder: Path, tmp_path: Path, recipe: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({IMAGE: np.zeros(3, np.uint8)}))
    convert(folder, tmp_path / "out", recipe)
    for name, entry in Checkpoint.open(tmp_path / "out").files[0].entries.items():
        assert entry.start % DTYPES[entry.dtype].itemsize == 0, name


def test_mlx_folders_have_what_mlx_asks_for(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "generation_config.json", max_length=None)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    text["per_layer_config"] = {"2": {"head_dim": 32, "num_key_value_heads": 1}}
    edit_json(folder / "config.json", text_config=text)
    convert(folder, tmp_path / "out", "4bit", mlx=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert "symmetric" not in json.dumps(config["quantization"])
    assert config["text_config"]["global_head_dim"] == 32 and "per_layer_config" not in config["text_config"]
    assert None not in json.loads((tmp_path / "out" / "generation_config.json").read_text()).values()
    file = Checkpoint.open(tmp_path / "out").files[0]
    module = GATE.removesuffix(".weight")
    scales, biases = (file.tensor(f"{module}.{part}").astype(np.float32) for part in ("scales", "biases"))
    np.testing.assert_array_equal(biases, -128 * scales)
    assert file.metadata == {"format": "mlx"}


def test_rows_that_groups_do_not_divide_are_named(tmp_path: Path) -> None:
    folder = floats(tmp_path, intermediate_size=96)
    report = convert(folder, tmp_path / "out", "4bit-mlx")
    assert report.quantized_share < report.wanted_share
    assert report.fallbacks[GATE.replace("gate", "down")] == (
        "rows of 96 do not divide into groups of 64; kept in bf16"
    )
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert "rows of 96" in manifest["tensors"][GATE.replace("gate", "down")]["fallback"]
    shown = CliRunner().invoke(main, ["convert", str(folder), "--out", str(tmp_path / "out"), "-r", "4bit-mlx"]).output
    assert "rows of 96 do not divide into groups of 64" in shown


def test_ones_own_rules(folder: Path, tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('"*.layers.0.*_proj" = "bf16"\n"*_proj" = { mode = "affine", bits = 3, group_size = 64 }\n')
    report = convert(folder, tmp_path / "out", rules=rules)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert not isinstance(checkpoint.tensor(GATE), QTensor)
    stored = checkpoint.tensor(GATE.replace("layers.0", "layers.1"))
    assert isinstance(stored, QTensor) and stored.format == Format(bits=3, group_size=64)
    assert report.recipe == "mine" and 0 < report.quantized_share < 0.9


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.toml", '"*" = \n', ("r.toml", "TOML", "line 1")),
        ("r.toml", '"*" = "4bit"\n', ("'*'", "no format '4bit'", "symmetric4-g32")),
        ("r.toml", '"*" = 4\n', ("'*'", "no format")),
        ("r.toml", '"*" = {bits = 7}\n', ("'*'", "bits, not 7")),
        ("r.toml", '"*" = "affine4-g16"\n', ("'*'", "groups of")),
        ("r.toml", '"" = "bf16"\n', ("empty glob",)),
        ("r.toml", '"*" = {bits = 4.5}\n', ("'*'", "bits is", "expected int")),
        ("r.json", '{"*": {"mode": ["mxfp4"]}}', ("'*'", "mode is", "expected str")),
        ("r.json", '{"*": {"bits": 4, "symmetric": "no"}}', ("'*'", "symmetric is 'no'", "expected bool")),
        ("r.toml", "", ("no rules",)),
        ("r.toml", 'otherwise = "drop"\n"*" = "bf16"\n', ("otherwise", "'stored' or 'bf16'")),
        ("r.toml", '"*.mlps.*" = "bf16"\n', ("'*.mlps.*' matches no module",)),
        ("r.json", '{"*": "bf16", "*": "nvfp4"}', ("r.json", "twice")),
        ("r.json", "[]", ("JSON object",)),
        ("r.yaml", "", (".toml or .json",)),
        ("absent.toml", None, ("absent.toml", "no such file")),
    ],
)
def test_rules_that_mean_nothing_are_named(
    folder: Path, tmp_path: Path, name: str, text: str | None, words: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with says(*words):
        convert(folder, tmp_path / "out", rules=tmp_path / name)
    for recipe in ("5bit", "", 0, ["4bit"], {}):
        with says("no recipe", "4bit-mlx"):
            convert(folder, tmp_path / "out", recipe)  # pyright: ignore[reportArgumentType]


def test_whole_numbers_in_rules_may_have_a_point(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"*": {"bits": 4.0, "group_size": 64.0}}')
    convert(folder, tmp_path / "out", rules=tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"*": "affine4-g64"}')
    convert(folder, tmp_path / "other", rules=tmp_path / "r.json")
    assert Checkpoint.open(tmp_path / "out").format(GATE) == Format(bits=4, group_size=64)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")


@pytest.mark.parametrize("target", ["stored", "bf16", "symmetric4-g32", "affine8-g64", "mxfp4", "mxfp8", "nvfp4"])
def test_formats_have_short_names(target: str) -> None:
    assert recipes.spell(recipes.parse(target)) == target


# ---- The folder -----------------------------------------------------------------------------------------------


def test_the_folder_is_complete_and_its_manifest_true(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "README.md").write_text("a card that would say the wrong things")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    edit_json(folder / "config.json", quantization_config=None)
    seen: list[Progress] = []
    report = convert(folder, tmp_path / "out", progress=seen.append)
    assert left(tmp_path) == {"out"}
    there = hashes(tmp_path / "out")
    assert there.keys() == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "LICENSE", "model.safetensors.index.json", SHARD, MANIFEST,
    }  # fmt: skip
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert {name: one["sha256"] for name, one in manifest["files"].items()} | {MANIFEST: there[MANIFEST]} == there
    assert manifest["source"]["name"] == "source" and manifest["recipe"]["name"] == "4bit"
    assert manifest["tensors"].keys() == weights.shapes(read_config(folder)).keys() | {
        one for one in manifest["tensors"] if "vision_tower" in one
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    file = Checkpoint.open(tmp_path / "out").files[0]
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in file.entries.values()) == report.bytes
    assert index["weight_map"] == dict.fromkeys(sorted(file.entries), SHARD)
    # Errors as measured anew, from the definition.
    checkpoint, plain = Checkpoint.open(tmp_path / "out"), Checkpoint.open(folder)
    for name, one in manifest["tensors"].items():
        if "error" in one:
            want = np.asarray(plain.tensor(name)).astype(np.float64)
            error = np.linalg.norm(dense(checkpoint.tensor(name), "float32") - want) / np.linalg.norm(want)
            assert one["error"] == pytest.approx(error, rel=1e-3), name
    assert all(one.done <= one.total and one.rate >= 0 for one in seen)
    assert {one.stage for one in seen} == {"converting", "hashing"}
    ends = [one for one in seen if one.done == one.total]
    assert ends and ends[-1].seconds_left == 0


@pytest.mark.parametrize("recipe", ["4bit", "nvfp4"])
def test_the_bytes_depend_on_nothing_else(folder: Path, tmp_path: Path, recipe: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(encode, "BLOCK", 1 << 12)
    monkeypatch.setattr(encode, "PIECE", 1 << 10)
    copy = tmp_path / "elsewhere" / "source"
    shutil.copytree(folder, copy)
    for name, source, workers in (("one", folder, 1), ("two", copy, 2), ("more", folder, 5)):
        convert(source, tmp_path / name, recipe, workers=workers)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "more")


def test_large_models_are_cut_into_files(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(job, "lay_out", lambda items, **style: plan.lay_out(items, limit=40_000, **style))
    convert(folder, tmp_path / "out", verify=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / one).stat().st_size < 50_000 for one in files)
    Checkpoint.open(tmp_path / "out").check()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A table of 128 MB converts in far less than that: rows are read in runs, and files are not mapped."""
    folder, rows = floats(tmp_path), 1 << 20
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"vocab_size": rows})
    table = {"model.decoder.embed_tokens.weight": np.zeros((rows, 64), ml_dtypes.bfloat16)}
    rewrite(folder, lambda tensors: tensors.update(table))
    code = f"""
import resource
from dgemma.convert import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert({str(folder)!r}, {str(tmp_path / "out")!r}, "8bit", workers=1, verify=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 100 << 20, f"{grown >> 20} MiB"


# ---- The command line, and sizes ------------------------------------------------------------------------------


def run(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, "--out", tmp_path / "out", "--recipe", "8bit", "--verify", "--workers", 1)
    assert result.exit_code == 0, result.output
    share = f"{convert(folder, tmp_path / 'out', '8bit').quantized_share:.2%} of the parameters quantized"
    for words in (share, "verified", "8.5", "stored"):
        assert words in result.output, words
    result = run("convert", folder, "--out", tmp_path / "out", "--recipe", "8bit", "--json")
    report = json.loads(result.output)
    assert report["fresh"] is False and report["recipe"] == "8bit" and report["path"] == str(tmp_path / "out")
    for args in (["-r", "5bit"], ["-r", "4bit"], ["--rules", tmp_path / "no.toml"]):
        result = run("convert", folder, "-o", tmp_path / "out", *args)
        assert result.exit_code == 1 and result.output.startswith("dgemma: error: "), result.output
        assert result.output.count("\n") == 1


def test_help_lists_every_recipe() -> None:
    text = " ".join(run("convert", "--help").output.split())
    assert all(name in text for name in recipes.RECIPES) and recipes.DEFAULT in text


def big() -> ModelConfig:
    return inspect.read_config(DATA / "config_26b.json")


def test_sizes_of_the_released_model() -> None:
    """From its config alone: the default recipe's text weights, and mlx-community's as published."""
    assert inspect.inspect_config(big(), recipes.find("4bit")).text_bytes <= 16.0e9
    assert inspect.inspect_config(big(), recipes.find("4bit-mlx")).text_bytes == pytest.approx(15.40e9, abs=5e6)
    assert inspect.inspect_config(big(), recipes.find("bf16")).parameters == pytest.approx(25.25e9, rel=1e-3)
    # A derived bias is held by MLX only: what it needs is what --mlx would store.
    plain, biased = (inspect.inspect_config(big(), recipes.find("4bit"), mlx=mlx) for mlx in (False, True))
    assert plain.held("mlx", "bfloat16") == biased.text_bytes > plain.held("torch", "bfloat16") == plain.text_bytes
    # What is not quantized has the width of the arithmetic; NumPy unpacks all of it.
    assert plain.held("torch", "float32") - plain.text_bytes == 2 * plain.weights.floats < 0.01 * plain.text_bytes
    assert plain.held("numpy", "bfloat16") == 2 * plain.parameters
    result = run("inspect", "--config", DATA / "config_26b.json", "--recipe", "4bit", "--json")
    report = json.loads(result.output)
    assert report["text_bytes"] <= 16.0e9 and {part["name"] for part in report["parts"]} >= {"experts", "router"}
    assert sum(part["parameters"] for part in report["parts"]) == report["parameters"]


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("mlx", [False, True])
def test_inspect_foretells_what_convert_writes(folder: Path, tmp_path: Path, recipe: str, mlx: bool) -> None:
    report = convert(folder, tmp_path / "out", recipe, mlx=mlx)
    planned = inspect.inspect_folder(folder, recipes.find(recipe), mlx=mlx)
    found = inspect.inspect_folder(tmp_path / "out")
    assert planned.text_bytes == found.text_bytes == report.text_bytes
    assert [part.formats for part in planned.parts] == [part.formats for part in found.parts] or mlx
    assert found.image_bytes == planned.image_bytes == 48


def test_inspect_shows_parts_memory_and_fit(folder: Path) -> None:
    output = run("inspect", folder).output
    for words in ("float checkpoint", "experts", "bits", "in float32, with 512 tokens", "torch", "mlx", "fits"):
        assert words in output, words
    assert run("inspect").exit_code == 2 and run("inspect", folder, "--config", "x").exit_code == 2
    result = run("inspect", "--config", folder / "absent.json")
    assert result.exit_code == 1 and "no such file" in result.output
