"""`dgemma.export` and its command: what is written, what is refused, and the loop of docs/onnx.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import dgemma
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format
from dgemma.cli import main
from dgemma.convert import recipes
from dgemma.core.config import ModelConfig
from dgemma.export import graphs, probe
from dgemma.export.graph import OWN
from dgemma.export.weights import imagined
from dgemma.tools.bench import SIZES
from dgemma.tools.verify_onnx import Exported
from said import says
from tiny import edit_json, tiny_checkpoint

DOCS = Path(__file__).parent.parent / "docs"
BOARD = "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425"
SOLVED = "354216\n216543\n532164\n641352\n425631\n163425"
GATE = "model.decoder.layers.0.mlp.gate_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, hidden_size=64, intermediate_size=64, moe_intermediate_size=64)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano as a folder that can be moved, and its 4bit form with both ways of writing products."""
    root = tmp_path_factory.mktemp("nano")
    dgemma.export("nano", root / "float", standalone=True)
    for name in ("4bit", "4bit-cpu"):
        dgemma.convert("nano", root / name, workers=1)
        dgemma.export(root / name, cpu=name.endswith("cpu"))
    return root


# ---- What is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, "4bit", "4bit-mlx"])
@pytest.mark.parametrize("options", [{}, dict(unified=True), dict(cpu=True, fp16=True, logits=True), dict(opset=24)])
def test_graphs_pass_the_checker_and_hold_no_weights(source: Path, tmp_path: Path, recipe: Any, options: Any) -> None:
    if recipe:
        dgemma.convert(source, tmp_path / "out", recipe=recipe, workers=1)
        source = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in source.glob("*.safetensors")}
    report = dgemma.export(source, **options)
    assert {path.name: path.read_bytes() for path in source.glob("*.safetensors")} == before
    assert report.lacking == () and not report.copied and not report.fused_experts
    for name, nodes in report.graphs.items():
        path = source / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert model.opset_import[0].version == options.get("opset", 23)
        assert {one.name for one in model.functions} == {"GegluMoE"} and model.functions[0].domain == OWN
        assert nodes > len(model.graph.node)
        large = [one for one in model.graph.initializer if not one.external_data and len(one.raw_data) > 4096]
        assert not large, [one.name for one in large]
        levels = [one.i for node in every_node(model) for one in node.attribute if one.name == "accuracy_level"]
        assert set(levels) <= {1} and bool(levels) == bool(recipe and not options.get("cpu"))
    Exported(source)  # whose sessions open


def every_node(model: Any) -> list[Any]:
    def walk(nodes: Any) -> Any:
        for node in nodes:
            yield node
            for one in node.attribute:
                yield from walk(one.g.node)

    return [*walk(model.graph.node), *(node for one in model.functions for node in walk(one.node))]


def test_external_data_are_the_checkpoints_own_bytes(source: Path, tmp_path: Path) -> None:
    dgemma.convert(source, tmp_path / "out", workers=1)
    dgemma.export(tmp_path / "out")
    file = Checkpoint.open(tmp_path / "out").files[0]
    stored = onnx.load(tmp_path / "out" / "denoise.onnx", load_external_data=False).graph.initializer
    places = {one.name: {entry.key: entry.value for entry in one.external_data} for one in stored if one.external_data}
    scales, words = (
        places[f"{GATE}.scales"],
        next(place for name, place in places.items() if f"{GATE}.weight as" in name),
    )
    for place, name in ((scales, f"{GATE}.scales"), (words, f"{GATE}.weight")):
        entry = file.entries[name]
        assert place == {"location": file.path.name, "offset": str(entry.start), "length": str(entry.nbytes)}


def test_another_folder_shares_the_weights_and_standalone_copies_them(source: Path, tmp_path: Path) -> None:
    linked = dgemma.export(source, tmp_path / "linked")
    assert (tmp_path / "linked" / "model.safetensors").samefile(source / "model.safetensors")
    copied = dgemma.export(source, tmp_path / "copied", standalone=True)
    assert copied.copied and not linked.copied
    assert not (tmp_path / "copied" / "model.safetensors").samefile(source / "model.safetensors")
    onnx.checker.check_model(tmp_path / "copied" / "denoise.onnx", full_check=True)
    ids, kept = list(range(20, 30)), {}
    for name in ("linked", "copied"):
        kept[name] = dgemma.load(tmp_path / name, backend="onnx").generate(ids, 20, eos=()).token_ids
    assert kept["linked"] == kept["copied"] == dgemma.load(source, backend="torch").generate(ids, 20, eos=()).token_ids


def test_the_manifest_says_what_a_loop_needs(source: Path) -> None:
    dgemma.export(source)
    about = json.loads((source / "dgemma-onnx.json").read_text())
    assert about["tokens"]["eos"] == [1, 5, 12] and about["weights"] == ["model.safetensors"]
    assert about["layers"][0]["window"] == 12 and about["layers"][2]["window"] is None
    assert about["sampler"]["steps"] == 6 and about["canvas_length"] == 16
    assert about["inputs"]["denoise"]["soft_embedding"]["shape"] == ["batch_size", "sequence_length", 64]
    past = about["inputs"]["encode"]["past_key_values.0.key"]
    assert past == {"dtype": "float32", "shape": ["batch_size", 2, "past_sliding_length", 8]}


@pytest.mark.parametrize("cpu", [False, True])
def test_the_26b_structure_is_built_without_weights(cpu: bool) -> None:
    """With every quantized format in place; how long it takes is in docs/onnx.md."""
    text = SIZES["26b"] | dict(model_type="diffusion_gemma_text", eos_token_id=1)
    config = ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": text, "canvas_length": 256})

    def format_of(module: str) -> Format | None:
        if "experts." in module:
            return recipes.parse("symmetric4-g32")  # type: ignore[return-value]
        kept = module.endswith(("norm", "norm_1", "norm_2", "scale", "scalar", "router.proj"))
        return None if kept else recipes.parse("symmetric8-g32")  # type: ignore[return-value]

    # The full layers have no v_proj, self-conditioning has three matrices, and the head works in 32 parts.
    get = imagined(weights.shapes(config), format_of)
    model = graphs.denoise_graph(config, get, graphs.Options(cpu=cpu))
    assert 2500 < sum(1 for _ in model.graph.all_nodes()) < (5000 if cpu else 4000)
    assert sum(node.op_type == "GegluMoE" for node in model.graph) == 30
    for node in model.graph:
        if node.op_type == "DequantizeLinear":  # not before the product's other side is computed: one at a time
            turn = node.inputs[2]
            while turn.producer().op_type != "Shape":
                turn = turn.producer().inputs[0 if turn.producer().op_type == "Mul" else 1]
            assert turn.producer().inputs[0].producer() is not None
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == (0 if cpu else 30 * 7 - 5 + 3 + 32)


# ---- What is refused ------------------------------------------------------------------------------------------


def test_formats_without_an_exact_operator_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    for recipe in ("nvfp4", "mxfp8"):
        dgemma.convert(source, tmp_path / recipe, recipe=recipe, workers=1)
        with says("which ONNX Runtime has no exact operator for"):
            dgemma.export(tmp_path / recipe)
        with says("no exact operator for"):
            dgemma.load(tmp_path / recipe, backend="onnx")
        assert not list((tmp_path / recipe).glob("*.onnx"))


def test_what_cannot_be_is_said_in_one_line(source: Path, tmp_path: Path) -> None:
    with says("opset is 22, expected one of 23, 24"):
        dgemma.export(source, opset=22)
    with says("standalone makes a folder of its own"):
        dgemma.export(source, standalone=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with says("is not empty"):
        dgemma.export(source, tmp_path / "full")
    with says("something: is a file, and graphs are put into a folder"):
        dgemma.export(source, tmp_path / "full" / "something")
    dgemma.export(source)
    with says("is not empty"):
        dgemma.export(source)
    dgemma.export(source, force=True)
    edit_json(source / "dgemma-onnx.json", vocab_size=7)
    with says("vocab_size is 7, not as in config.json; export again"):
        dgemma.load(source, backend="onnx")
    edit_json(source / "dgemma-onnx.json", version=9)
    with says("its graphs are of manifest version 9, this dgemma reads 3; export again"):
        dgemma.load(source, backend="onnx")


@pytest.mark.parametrize("kind", ["CumSum", "ArgMax"])  # an attribute that there is not, and one that no shape fits
def test_a_graph_that_the_checker_finds_faulty_is_not_left(
    source: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import onnx_ir as ir

    written = graphs.denoise_graph

    def bent(*arguments: Any) -> Any:
        model = written(*arguments)
        node = next(one for one in model.graph if one.op_type == kind)
        node.attributes["axis"] = ir.AttrInt64("axis", 99)
        return model

    monkeypatch.setattr(graphs, "denoise_graph", bent)
    for out in (None, source.parent / "out"):
        with says("denoise.onnx: onnx ", "finds it faulty: "):
            dgemma.export(source, out)
    assert not [*source.glob("*.onnx"), *source.glob("*.partial")] and not (source.parent / "out").exists()


def test_operators_that_are_not_there_are_named() -> None:
    import onnx_ir as ir

    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("FutureExperts", [value], domain="com.microsoft")
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 23, "com.microsoft": 1}, name="g")
    assert probe.lacking([ir.Model(graph, ir_version=11)]) == ("com.microsoft::FutureExperts-1",)


# ---- The command, and the loop of the documentation -----------------------------------------------------------


def test_the_command_verifies_what_it_wrote(source: Path, tmp_path: Path) -> None:
    dgemma.convert(source, tmp_path / "out", workers=1)
    run = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--verify", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["errors"].pop("next_soft_embedding") < 1e-6  # at a low temperature; see test_onnx.check
    cache = [report["errors"].pop(f"present.{i}.{part}") for i in range(3) for part in ("key", "value")]
    assert all(0 < one < 1e-10 for one in cache)
    assert report["errors"].pop("entropy") < 1e-3 and set(report["errors"].values()) == {0.0}
    shown = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--force", "--unified"])
    assert "unified.onnx" in shown.output and "not copied" in shown.output


def test_verify_notices_a_wrong_weight(source: Path, tmp_path: Path) -> None:
    from dgemma.tools.verify_onnx import verify

    dgemma.export(source, tmp_path / "copy", standalone=True)
    entry = Checkpoint.open(tmp_path / "copy").files[0].entries["model.decoder.norm.weight"]
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(entry.start)
        file.write(np.float32([7.0]).tobytes())
    assert verify(tmp_path / "copy", source)["next_soft_embedding"] > 1e-6


def test_verify_says_the_error_of_every_output(source: Path) -> None:
    for unified in (False, True):
        run = CliRunner().invoke(
            main, ["export", str(source), "--verify", "--logits", "--force", *["--unified"] * unified]
        )
        assert run.exit_code == 0, run.output
        outputs = {
            name
            for graph in json.loads((source / "dgemma-onnx.json").read_text())["outputs"].values()
            for name in graph
        }
        assert outputs == dgemma.export(source, verify=True, logits=True, force=True, unified=unified).errors.keys()
        for layer in range(3):
            assert re.search(rf"present\.{layer}: key NMSE [0-9.e-]+, value NMSE [0-9.e-]+\n", run.output)
        for name in ("logits: NMSE", "next_soft_embedding: NMSE", "token: 0.00% of", "entropy: "):
            assert f"    {name}" in run.output


def test_verify_notices_a_wrong_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma.tools import verify_onnx

    dgemma.export(source, logits=True)
    encode, denoise = Exported.encode, Exported.denoise

    def shifted(self: Exported, cache: Any, *rest: Any) -> Any:
        made = encode(self, cache, *rest)
        return made | {"past_key_values.1.value": made["past_key_values.1.value"] * 1.01}

    def unknown(self: Exported, *arguments: Any, **step: Any) -> Any:
        made = denoise(self, *arguments, **step)
        return made | {"logits": made["logits"] * np.float32(np.nan)}

    monkeypatch.setattr(Exported, "encode", shifted)
    monkeypatch.setattr(Exported, "denoise", unknown)
    errors = verify_onnx.verify(source, source)
    assert errors["present.0.value"] < 1e-10 < errors["present.1.value"] and errors["logits"] == np.inf


def test_the_loop_of_the_documentation(nano: Path, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "onnx.md").read_text(), re.DOTALL)
    assert code and "dgemma" not in code[1].replace("dgemma-onnx.json", "")
    assert len(code[1].splitlines()) <= 40 and max(map(len, code[1].splitlines())) <= 120
    (tmp_path / "loop.py").write_text(code[1])
    for name in ("float", "4bit"):
        run = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "loop.py"), str(nano / name), BOARD], capture_output=True, text=True
        )
        assert run.stdout.strip() == SOLVED, run.stderr


WITHOUT = """
import sys, importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == sys.argv[1] else found(name, *rest)
sys.modules[sys.argv[1]] = None
import dgemma
try:
    if sys.argv[2] == "export":
        dgemma.export("nano", sys.argv[3], standalone=True, verify=True)
    else:
        print(dgemma.load(sys.argv[3], backend="onnx").generate(sys.argv[4]).text)
except dgemma.DgemmaError as error:
    print(error)
"""


def test_what_is_not_installed_is_named_and_an_exported_folder_needs_onnxruntime_alone(
    nano: Path, tmp_path: Path
) -> None:
    def without(module: str, *arguments: str) -> str:
        run = subprocess.run([sys.executable, "-c", WITHOUT, module, *arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert without("onnx_ir", "load", str(nano / "float"), BOARD) == SOLVED
    install = "pip install 'dgemma[onnx]'"
    assert without("onnx_ir", "load", "nano", BOARD) == (
        f"writing ONNX graphs needs onnx-ir: {install}, or export the folder elsewhere"
    )
    out = str(tmp_path / "out")
    assert without("onnx_ir", "export", out) == f"writing ONNX graphs needs onnx-ir: {install}"
    assert without("onnx", "export", out) == f"checking ONNX graphs needs onnx: {install}"
    assert without("onnxruntime", "export", out) == f"verifying ONNX graphs needs onnxruntime: {install}"
    assert without("onnxruntime", "load", "nano", BOARD) == f"backend 'onnx' is not installed: {install}"
    assert not (tmp_path / "out").exists()


def test_doctor_and_inspect_know_the_backend(source: Path, tmp_path: Path) -> None:
    def asked(*arguments: str) -> Any:
        run = CliRunner().invoke(main, [*arguments, "--json"])
        assert run.exit_code == 0, run.output
        return json.loads(run.stdout)

    held = asked("inspect", str(source))["weights_bytes"]
    assert held["onnx"] == held["torch"]  # in the file's own width, mapped
    model = asked("doctor", "--model", str(source), "--backend", "onnx")["model"]
    assert model["weights_bytes"] == held["onnx"] and model["fits"]
    nano = asked("inspect", "nano")["weights_bytes"]
    assert nano["onnx"] == 2 * nano["torch"]  # cast from bfloat16 in each of two sessions
    dgemma.convert(source, tmp_path / "nvfp4", recipe="nvfp4", workers=1)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "nvfp4")]).stdout
    assert "has no exact operators for nvfp4" in shown
