"""ONNX: exported graphs in plain onnxruntime against the torch backend, and backend `onnx` over whole generations."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import dgemma
import hf
from dgemma import DgemmaError, DiffusionGemma
from dgemma.checkpoints import loading
from dgemma.checkpoints.files import read_json
from dgemma.core import model as definition
from dgemma.core import sampler
from dgemma.export.manifest import NAME
from dgemma.tools.verify_onnx import Exported
from law import assert_close_f32
from onnx_primitives import draws_of, plain_step
from tiny import tiny_checkpoint

CANVAS = 16
SHAPES = {
    name: {key: value for key, value in shape.items() if key != "layer_types"}
    | {"layer_types": shape["layer_types"], "num_hidden_layers": len(shape["layer_types"])}
    for name, shape in hf.SHAPES.items()
}
PREVIOUS = 0.3
"""Scale of a random mean embedding, about that of a real one."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@cache
def folder_of(root: Path, shape: str, recipe: str, form: str) -> Path:
    """Export a random model, graphs beside its weights."""
    source = root / shape
    if not source.exists():
        tiny_checkpoint(root, name=shape, canvas_length=CANVAS, **sizes(shape))
    portable = form == "portable"
    if portable and recipe == "float32":
        dgemma.export(source, root / f"{shape}-portable", logits=True, portable=True, standalone=True)
        return root / f"{shape}-portable"
    if recipe != "float32":
        dgemma.convert(source, root / f"{shape}-{recipe}-{form}", recipe=recipe, workers=1)
        source = root / f"{shape}-{recipe}-{form}"
    dgemma.export(source, logits=True, force=True, cpu=form == "cpu", portable=portable, unified=form == "unified")
    return source


def sizes(shape: str) -> dict[str, Any]:
    """Sizes of a shape; where weights are quantized, such as groups of 64 divide."""
    if shape == "even":
        return SHAPES["top4"] | dict(hidden_size=128, intermediate_size=192, moe_intermediate_size=64, head_dim=32)
    return SHAPES[shape]


@cache
def torch_model(folder: Path) -> DiffusionGemma:
    return dgemma.load(folder, backend="torch", device="cpu", dtype="float32")


def session_options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 2  # a shape that is not as declared is a warning, and should be seen
    options.intra_op_num_threads = 1
    return options


def check(folder: Path, batch: int, prompt: int, canvases: int, graphs: Exported | None = None) -> None:
    """Read a prompt and committed canvases; behind them take a first step, and a later one with positions held."""
    graphs, loaded = graphs or Exported(folder, session_options()), torch_model(folder)
    passes, config = loaded.engine.passes, loaded.config
    ops, weights = passes.ops, passes.model
    draw = np.random.default_rng([batch, prompt, canvases])
    tokens = [draw.integers(6, config.vocab_size, (batch, size)) for size in (prompt, *[CANVAS] * (canvases - 1))]
    ours, at = graphs.empty(batch), 0
    theirs = definition.new_cache(
        ops, config, slots=batch, capacity=prompt + canvases * CANVAS, scratch=max(prompt, CANVAS)
    )
    for one in tokens:
        ours = graphs.encode(ours, one, at)
        theirs = definition.encode(ops, weights, theirs, ops.asarray(one, "int32"))
        at += one.shape[1]
    for i, (old, new) in enumerate(zip(graphs.about["layers"], theirs.layers, strict=True)):
        window = config.layers[i].window
        rows = at if window is None else min(at, window - 1)
        for name, array in zip(old["past"], new, strict=True):
            assert_close_f32(ours[name], ops.to_numpy(array)[:, :, :rows], name)
    canvas = draw.integers(6, config.vocab_size, (batch, CANVAS))
    for scale, share in ((0.0, 0.0), (PREVIOUS, 0.4)):
        soft = (scale * draw.normal(size=(batch, CANVAS, config.hidden_size))).astype(np.float32)
        uniform = draw.random((batch, CANVAS)).astype(np.float32)
        noise = draw.integers(6, config.vocab_size, (batch, CANVAS))
        # Random logits reach the soft cap: a lower temperature makes more of their rounding than the law allows for.
        heat = draw.uniform(4.0, 6.0, (batch, 1)).astype(np.float32)
        tokens = draw.integers(6, config.vocab_size, (batch, CANVAS))
        held = np.where(draw.random((batch, CANVAS)) < share, tokens, -1)
        got = graphs.denoise(
            ours, canvas, at, soft_embedding=soft, temperature=heat, uniform=uniform, noise=noise.astype(np.int64),
            entropy_bound=np.float32([3.0]), held=held,
        )  # fmt: skip
        state = sampler.start(ops, ops.asarray(canvas, "int32"), config.hidden_size)._replace(soft=ops.asarray(soft))
        x = definition.denoise(ops, weights, theirs, state.canvas, state.soft, ops.asarray(held, "int32"))
        logits = ops.to_numpy(ops.logits(x, weights.embed_tokens, config.softcap))
        state = definition.step(ops, weights, theirs, state, draws_of(ops, heat, uniform, noise, 3.0, held))
        assert_close_f32(got["logits"], logits, "logits")
        assert_close_f32(got["next_soft_embedding"], ops.to_numpy(state.soft), "next_soft_embedding")
        assert_close_f32(got["entropy"], ops.to_numpy(state.entropy), "entropy")
        for name, array in {"argmax": state.argmax, "accepted": state.accepted, "next_canvas": state.canvas}.items():
            np.testing.assert_array_equal(got[name], ops.to_numpy(array), name)
        drawn = ops.to_numpy(state.canvas)[got["accepted"]]
        np.testing.assert_array_equal(got["token"][got["accepted"]], drawn)
        free = held < 0
        assert got["accepted"][free].any() and not got["accepted"].all() and free.all() == (share == 0)


LENGTHS = {"one token": (0, 1), "window - 1": (1, -1), "window": (1, 0), "window + 1": (1, 1), "three": (3, 0)}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_agree_with_torch(root: Path, shape: str, case: str) -> None:
    folder = folder_of(root, shape, "float32", "plain")
    windows, more = LENGTHS[case]
    for batch, canvases in ((1, 1), (3, 2), (1, 3)):
        check(folder, batch, windows * SHAPES[shape]["sliding_window"] + more, canvases)


@pytest.mark.parametrize("form", ["plain", "cpu", "unified", "portable"])
@pytest.mark.parametrize("recipe", ["4bit", "8bit", "4bit-mlx"])
def test_quantized_graphs_agree_with_torch(root: Path, recipe: str, form: str) -> None:
    folder = folder_of(root, "even", recipe, form)
    check(folder, 3, 19, 2)
    check(folder, 1, 1, 1)


class Elsewhere(Exported):
    """Graphs in another runtime: `opened` turns a file into something with `run(names, feeds)`."""

    def __init__(self, folder: Path, opened: Callable[[Path], Any]) -> None:
        self.about = read_json(folder / NAME)
        self.dtype = np.dtype(self.about["dtype"])
        self._sessions = {name: opened(folder / file) for name, file in self.about["graphs"].items()}


@pytest.mark.parametrize("recipe", ["float32", "4bit", "8bit", "4bit-mlx"])
def test_portable_graphs_in_the_standards_own_evaluator(root: Path, recipe: str) -> None:
    """Operators of the standard alone, no function of ours, and what onnx itself makes of them."""
    folder = folder_of(root, "even", recipe, "portable")
    for name in ("encode", "denoise"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 23)] and not model.functions
    graphs = Elsewhere(folder, lambda path: ReferenceEvaluator(onnx.load(path)))
    check(folder, 2, 19, 2, graphs)
    check(folder, 1, 1, 1, graphs)


class _OpenVino:
    def __init__(self, path: Path) -> None:
        import openvino

        self._model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        made = {one.get_any_name(): array for one, array in self._model(feeds).items()}
        return [made[name] for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["float32", "4bit", "8bit", "4bit-mlx"])
def test_portable_graphs_in_openvino(root: Path, recipe: str) -> None:
    pytest.importorskip("openvino")
    folder = folder_of(root, "even", recipe, "portable")
    check(folder, 2, 19, 2, Elsewhere(folder, _OpenVino))


def test_portable_graphs_run_in_the_backend_and_in_one(root: Path) -> None:
    dgemma.export("nano", root / "nano", portable=True, standalone=True)
    board = "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425"
    want, got = (
        dgemma.load(root / "nano", backend=name, dtype="float32").generate(board) for name in ("torch", "onnx")
    )
    assert got.token_ids == want.token_ids
    source = folder_of(root, "even", "float32", "plain")
    dgemma.export(source, root / "one-portable", unified=True, portable=True, logits=True, standalone=True)
    check(root / "one-portable", 3, 20, 2)
    with pytest.raises(DgemmaError, match="cpu and portable are two ways to write the same products"):
        dgemma.export(source, root / "neither", cpu=True, portable=True)


def test_a_vocabulary_in_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma.export import head

    monkeypatch.setattr(head, "PART", 1 << 18)  # 512 tokens of the 600
    for form in ("cpu", "plain", "portable"):
        dgemma.convert(folder_of(root, "even", "float32", "plain"), root / f"parts-{form}", recipe="8bit", workers=1)
        dgemma.export(root / f"parts-{form}", logits=True, cpu=form == "cpu", portable=form == "portable")
        check(root / f"parts-{form}", 1, 9, 1)


@pytest.mark.parametrize("heat", [1.0, 0.02])
def test_parts_of_a_vocabulary_follow_the_highest_score(
    tmp_path: Path, heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head alone, over four parts: peaks that rise and fall from part to part, ties, and draws at the ends."""
    import onnx_ir as ir
    import onnxruntime as ort

    from dgemma.backends.numpy import NumpyOps
    from dgemma.checkpoints import safetensors
    from dgemma.checkpoints.quant import Format, dequantize, quantize
    from dgemma.export import head
    from dgemma.export.graph import TYPES, Builder
    from dgemma.export.ops import OnnxOps
    from dgemma.export.weights import PackedPlaces, Place

    monkeypatch.setattr(head, "PART", 512)
    vocab, width, rows = 3 * 512 + 70, 64, 12
    draw = np.random.default_rng(3)
    values = (0.3 * draw.normal(size=(vocab, width))).astype(np.float32)
    values[1400] = values[600] = values[100]  # ties within a part and across
    table = quantize(values, Format(bits=8, group_size=32, symmetric=True))
    values = dequantize(table)
    safetensors.write(
        tmp_path / "table.safetensors", {"words": table.words, "scales": table.scales.view(ml_dtypes.bfloat16)}
    )
    file = safetensors.SafetensorsFile.open(tmp_path / "table.safetensors")

    def place(name: str, dtype: str) -> Place:
        entry = file.entries[name]
        where = Place(name=name, file=file.path.name, start=entry.start, dtype=dtype, shape=entry.shape)
        return dataclasses.replace(where, base=str(tmp_path))

    x = (0.2 * draw.normal(size=(1, rows, width))).astype(np.float32)
    for row, token in enumerate((5, 700, 1200, vocab - 1, 511, 512, 600)):
        x[0, row] = 5.0 * values[token]  # sharply peaked, each in another part
    u = draw.random((1, rows)).astype(np.float32)
    u[0, 7:10] = 0.0, 1.0 - 2.0**-24, 0.5

    ops = OnnxOps(Builder(), cpu=True)
    given = [ops.input(name, "float32", one.shape) for name, one in (("x", x), ("u", u))]
    stored = PackedPlaces(
        format=table.format, shape=(vocab, width), words=place("words", "U32"), scales=place("scales", "BF16"),
        biases=None,
    )  # fmt: skip
    temperature = np.full((1, 1), heat, np.float32)
    made = ops.vocab_head(given[0], stored, 30.0, ops.asarray(temperature), given[1])
    for name, one in zip(("token", "argmax", "entropy", "soft"), made, strict=True):
        one.value.name, one.value.type = name, ir.TensorType(TYPES[one.dtype])
    graph = ops.builder.graph([one.value for one in made], name="head", opset=23)
    assert sum(node.op_type == "Tanh" for node in graph) == 4
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "head.onnx")
    session = ort.InferenceSession(tmp_path / "head.onnx", session_options(), providers=["CPUExecutionProvider"])
    token, argmax, entropy, soft = map(np.asarray, session.run(None, {"x": x, "u": u}))

    plain = NumpyOps("float32")
    want = plain.vocab_head(x, values, 30.0, temperature, u)
    np.testing.assert_array_equal(token, want[0])
    np.testing.assert_array_equal(argmax, want[1])
    np.testing.assert_allclose(entropy, want[2], atol=1e-4)
    assert_close_f32(soft, want[3], "mean embedding")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are read from Linux's /proc")
def test_sessions_and_checkpoint_share_one_mapping(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a packed file would count its scales, or all of it, twice: 1.5 times the file instead of 1.2."""
    monkeypatch.setattr(loading, "HELD", 0)  # as for a large model: a small one is read into memory instead
    folder = tmp_path / "alone"  # which no other test has mapped
    shutil.copytree(folder_of(root, "even", "4bit", "cpu"), folder)
    loaded = dgemma.load(folder, backend="onnx", device="cpu", dtype="float32")
    loaded.generate([5, 6, 7], max_new_tokens=2 * CANVAS, steps=2)
    maps = Path("/proc/self/maps").read_text().splitlines()
    for file in folder.glob("*.safetensors"):
        assert sum(str(file) in line for line in maps) == 1, file.name


def test_one_graph_of_both(root: Path) -> None:
    folder = root / "one"
    dgemma.export(folder_of(root, "top4", "float32", "plain"), folder, unified=True, standalone=True, logits=True)
    check(folder, 3, 20, 2)


@pytest.mark.parametrize("recipe", ["float", "4bit", "8bit"])
def test_generations_of_nano_are_token_identical(tmp_path: Path, recipe: str) -> None:
    source: Any = "nano"
    if recipe != "float":
        source = tmp_path / recipe
        dgemma.convert("nano", source, recipe=recipe, workers=1)
    want, got = (dgemma.load(source, backend=backend, dtype="float32") for backend in ("torch", "onnx"))
    assert (got.backend, got.device, got.dtype) == ("onnx", "cpu", "float32")
    draw = np.random.default_rng(0)
    prompts = [want.tokenizer.render([{"role": "user", "content": "1..4\n..1.\n.1..\n4..1"}])]
    prompts += [draw.integers(16, 200, size).tolist() for size in (7, 64, 150)]
    for seed, prompt in enumerate(prompts):
        one, two = (model.generate(prompt, 120, seed, eos=(), steps=10) for model in (want, got))
        assert one.stats.canvases == 3 and one.stats.steps > 3
        assert (two.token_ids, two.stats.steps) == (one.token_ids, one.stats.steps)


def test_the_backend_makes_logits_and_runs_exported_graphs(root: Path) -> None:
    folder = folder_of(root, "top4", "float32", "plain")
    want, got = torch_model(folder), dgemma.load(folder, backend="onnx")
    prompt, canvas = list(range(20, 40)), list(range(60, 76))
    previous = np.random.default_rng(0).normal(0, 4, (CANVAS, 600)).astype(np.float32)
    for given in (None, previous):
        assert_close_f32(got.logits(prompt, canvas, given), want.logits(prompt, canvas, given), "logits")
    (folder / "denoise.onnx").rename(folder / "away")
    try:
        with pytest.raises(DgemmaError, match=r"denoise\.onnx: no such file"):
            dgemma.load(folder, backend="onnx")
    finally:
        (folder / "away").rename(folder / "denoise.onnx")


def test_default_bodies_write_the_same_graph() -> None:
    """The primitives alone carry the model: the fused ops' default bodies, written out and run."""
    got, want = plain_step()
    for name in want:
        assert_close_f32(got[name], want[name], name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(device="gpu"), "device 'gpu' is not one that onnx has"),
        (dict(device="cuda"), "no CUDA provider"),
        (dict(dtype="bfloat16"), "computes in float32 or float16, not in bfloat16"),
    ],
)
def test_what_the_backend_cannot_do(options: dict[str, str], match: str) -> None:
    with pytest.raises(DgemmaError, match=match):
        dgemma.load("nano", backend="onnx", **options)
