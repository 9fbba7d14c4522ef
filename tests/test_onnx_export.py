"""`dgemma.export` and its command: what is written, what is refused, the loop of docs/onnx.md, and older runtimes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import dgemma
from dgemma.cli import main
from dgemma.core import weights
from dgemma.core.bench import SIZES
from dgemma.core.checkpoint import Checkpoint, resolve
from dgemma.core.config import ModelConfig
from dgemma.core.convert import recipes
from dgemma.core.quant import Format
from dgemma.export import graphs, probe
from dgemma.export.graph import OWN
from dgemma.export.verify import Graphs
from dgemma.export.weights import imagined
from published import left
from said import says
from tiny import edit_json, tiny_checkpoint

DOCS = Path(__file__).parent.parent / "docs"
BOARD = "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425"
SOLVED = "354216\n216543\n532164\n641352\n425631\n163425"
VERSIONS = ("1.24.1", "1.28.0", "1.30.0", "newest")
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
    if not options.get("fp16"):
        Graphs(source)  # whose sessions open


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
    """In seconds and little memory (docs/onnx.md has the measured ones), with every quantized format in place."""
    text = SIZES["26b"] | dict(model_type="diffusion_gemma_text", eos_token_id=1)
    config = ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": text, "canvas_length": 256})

    def format_of(module: str) -> Format | None:
        if "experts." in module:
            return recipes.parse("symmetric4-g32")  # type: ignore[return-value]
        kept = module.endswith(("norm", "norm_1", "norm_2", "scale", "scalar", "router.proj"))
        return None if kept else recipes.parse("symmetric8-g32")  # type: ignore[return-value]

    # The full layers have no v_proj, self-conditioning has three matrices, and the head works in parts of 96 MiB.
    head = -(-262_144 // ((96 << 20) // (4 * 2816) // 512 * 512))
    began = time.perf_counter()
    get = imagined(weights.shapes(config), format_of)
    model = graphs.denoise_graph(config, get, graphs.Options(cpu=cpu))
    assert time.perf_counter() - began < 10
    assert 2500 < sum(1 for _ in model.graph.all_nodes()) < 3000
    assert sum(node.op_type == "GegluMoE" for node in model.graph) == 30
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == (0 if cpu else 30 * 7 - 5 + 3 + head)


# ---- What is refused ------------------------------------------------------------------------------------------


def test_formats_without_an_exact_operator_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    for recipe in ("nvfp4", "mxfp8"):
        dgemma.convert(source, tmp_path / recipe, recipe=recipe, workers=1)
        says(lambda recipe=recipe: dgemma.export(tmp_path / recipe), "which ONNX Runtime has no exact operator for")
        says(lambda recipe=recipe: dgemma.load(tmp_path / recipe, backend="onnx"), "no exact operator for")
        assert not list((tmp_path / recipe).glob("*.onnx"))


def test_what_cannot_be_is_said_in_one_line(source: Path, tmp_path: Path) -> None:
    says(lambda: dgemma.export(source, opset=22), "opset is 22, expected one of 23, 24")
    says(lambda: dgemma.export(source, standalone=True), "standalone makes a folder of its own")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    says(lambda: dgemma.export(source, tmp_path / "full"), "is not empty")
    dgemma.export(source)
    says(lambda: dgemma.export(source), "is not empty")
    dgemma.export(source, force=True)
    edit_json(source / "dgemma-onnx.json", vocab_size=7)
    says(lambda: dgemma.load(source, backend="onnx"), "vocab_size is 7, not as in config.json; export again")
    edit_json(source / "dgemma-onnx.json", version=9)
    says(lambda: dgemma.load(source, backend="onnx"), "not a dgemma-onnx manifest of version 1")


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
    assert report["errors"].pop("entropy") < 1e-3 and set(report["errors"].values()) == {0.0}
    shown = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--force", "--unified"])
    assert "unified.onnx" in shown.output and "not copied" in shown.output


def test_verify_notices_a_wrong_weight(source: Path, tmp_path: Path) -> None:
    from dgemma.export.verify import verify

    dgemma.export(source, tmp_path / "copy", standalone=True)
    entry = Checkpoint.open(tmp_path / "copy").files[0].entries["model.decoder.norm.weight"]
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(entry.start)
        file.write(np.float32([7.0]).tobytes())
    assert verify(tmp_path / "copy", source)["next_soft_embedding"] > 1e-6


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


# ---- Runtimes -------------------------------------------------------------------------------------------------

MATRIX = """
import sys; sys.path.insert(0, sys.argv[1])
import json; from pathlib import Path; import numpy as np; import onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 3
for folder in map(Path, sys.argv[2:]):
    about = json.loads((folder / "dgemma-onnx.json").read_text())
    for name, file in about["graphs"].items():
        session = ort.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        stored = dict(np.load(folder / f"{name}.npz"))
        feeds = {one.name: stored[one.name] for one in session.get_inputs()}
        for out, made in zip(session.get_outputs(), session.run(None, feeds)):
            want = stored["want " + out.name]
            if made.dtype != np.float32 or out.name == "entropy":
                assert np.abs(made.astype(float) - want).max() < 1e-5, (folder, out.name)
            else:
                error = np.square(made - want).sum() / np.square(want).sum()
                assert error < 1e-10, (folder, out.name, error)
print(ort.__version__)
"""


@pytest.fixture(scope="module")
def questions(nano: Path) -> list[Path]:
    """Inputs for every graph, and what the torch backend says of them: the runtimes of the matrix have no torch."""
    loaded = dgemma.load("nano", backend="torch", dtype="float32")
    ids = np.asarray([loaded.tokenizer.render([{"role": "user", "content": BOARD}])])
    folders = [nano / "float", nano / "4bit", nano / "4bit-cpu"]
    for folder in folders:
        about, reader = Graphs(folder), np.random.default_rng(0)
        cache = about.empty(1)
        for name in ("encode", "denoise"):
            size = ids.shape[1] if name == "encode" else about.about["canvas_length"]
            feeds: dict[str, np.ndarray] = cache | {
                "input_ids": ids if name == "encode" else reader.integers(16, 200, (1, size)),
                "position_ids": (0 if name == "encode" else ids.shape[1]) + np.arange(size)[None],
            }
            if name == "denoise":
                feeds |= {
                    "soft_embedding": np.zeros((1, size, about.about["hidden_size"]), np.float32),
                    "temperature": np.float32([[1.2]]), "uniform": reader.random((1, size)).astype(np.float32),
                    "noise": reader.integers(16, 200, (1, size)), "entropy_bound": np.float32([0.1]),
                }  # fmt: skip
            session = about._sessions[name]
            made = session.run(None, feeds)
            want = {f"want {one.name}": array for one, array in zip(session.get_outputs(), made, strict=True)}
            np.savez(folder / f"{name}.npz", **feeds, **want)
            if name == "encode":
                cache = about.encode(cache, ids, 0)
    return folders


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Older runtimes, side by side in folders; the newest is the one that is installed."""
    root = tmp_path_factory.mktemp("runtimes")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    runs = {
        version: subprocess.Popen(
            [*pip, str(root / version), f"onnxruntime=={version}"], stderr=subprocess.PIPE, text=True
        )
        for version in VERSIONS[:-1]
    }
    for version, run in runs.items():
        _, said = run.communicate()
        assert run.returncode == 0, f"onnxruntime {version} could not be installed from the package index: {said}"
    return {version: root / version for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_other_runtimes_agree(version: str, installed: dict[str, Path], questions: list[Path]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MATRIX, str(installed[version]), *map(str, questions)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert version in ("newest", run.stdout.strip())


__all__ = ["left", "resolve"]
