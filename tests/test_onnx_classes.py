"""Classes of tokens in ONNX: the head's graph against the definition, generations inside a language against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import dgemma
import loops
from dgemma import backends
from dgemma.backends.numpy import NumpyOps
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.constraints.walk import Constraint
from dgemma.core.canvas import FREE, Chosen, Classes
from dgemma.core.errors import DgemmaError
from dgemma.core.parts import NOTHING, Masses
from dgemma.core.passes import Passes
from dgemma.export import classes as head
from dgemma.export import graphs
from dgemma.export.graph import TYPES, Builder
from dgemma.export.ops import OnnxOps
from dgemma.export.weights import from_checkpoint
from lattices import random_automaton
from law import assert_close_f32, assert_low_precision
from test_onnx_held import CANVAS, generated
from tiny import tiny_checkpoint

RECIPES = ("float", "4bit", "8bit")


class _Given(OnnxOps):
    """Weights as constants, so that the graph needs no files."""

    def pack(self, weight: np.ndarray) -> Any:
        return self.array(self.builder.constant(weight), weight.shape, "float32")


def ran(x: np.ndarray, table: np.ndarray, heat: np.ndarray, of: np.ndarray, count: int) -> tuple[np.ndarray, Masses]:
    """The head's graph alone: x [B, L, D], table [V, D], temperature [B, 1] → mean embedding and masses."""
    ops = _Given(Builder())
    given = {"x": x, "heat": heat, "of": of.astype(np.int64), "count": np.asarray([count])}
    kinds = {"x": "float32", "heat": "float32", "of": "int32", "count": "int32"}
    inputs = {name: ops.input(name, kinds[name], one.shape) for name, one in given.items()}
    soft, masses = ops.class_head(inputs["x"], ops.pack(table), 30.0, inputs["heat"], inputs["of"], inputs["count"])
    outputs = {"soft": soft, **masses._asdict()}
    for name, one in outputs.items():
        one.value.name, one.value.type = name, ir.TensorType(TYPES[one.dtype])
    graph = ops.builder.graph([one.value for one in outputs.values()], name="head", opset=23)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 2, 1
    proto = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    made = dict(zip(outputs, map(np.asarray, session.run(list(outputs), given)), strict=True))
    return made.pop("soft"), Masses(**made)


def alike(got: Masses, want: Masses) -> None:
    """Hold masses to the law where there are tokens at all, and to `NOTHING` where there are none."""
    assert all(one.shape == got.mass.shape for one in got)
    np.testing.assert_array_equal(got.best, want.best)
    some = want.score > NOTHING / 2
    for name in ("mass", "score", "moment"):
        one, other = getattr(got, name), getattr(want, name)
        np.testing.assert_array_equal(one[~some], other[~some], name)
        assert_close_f32(1 - one[some], 1 - other[some], name)  # of a sure class the log is nothing but rounding
    assert (got.mass >= got.score).all()


@pytest.mark.parametrize(("part", "large"), [(1 << 12, 1 << 16), (1 << 30, 1 << 16), (1 << 13, 100)])
@pytest.mark.parametrize(("vocab", "count", "dead"), [
    (16, 1, 0.0), (17, 3, 0.0), (600, 7, 0.4), (601, 40, 0.99), (2000, 500, 0.1), (1000, 5, 1.0),
])  # fmt: skip
def test_the_head_of_classes_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, part: int, large: int, vocab: int, count: int, dead: float
) -> None:
    """In one part and in up to 32, in small blocks and large; with classes that are empty, ties, tokens of no class."""
    monkeypatch.setattr(head, "PART", part)
    monkeypatch.setattr(head, "LARGE", large)
    draw = np.random.default_rng([vocab, count])
    x = draw.normal(size=(2, 5, 24)).astype(np.float32)
    table = draw.normal(size=(vocab, 24)).astype(np.float32)
    table[vocab // 2] = table[vocab - 1] = table[3]
    of = np.where(draw.random(vocab) < dead, FREE, draw.integers(0, count, vocab)).astype(np.int32)
    of[[3, vocab // 2, vocab - 1]] = 0 if dead < 1 else FREE
    if count > 5:
        of[of == 5] = 2
    x[0, 0] = 3 * table[3]  # the tie is the likeliest of its class
    heat = np.float32([[4.0], [6.0]])
    soft, masses = ran(x, table, heat, of, count)
    want = NumpyOps("float32").class_head(x, table, 30.0, heat, of, count)
    assert_close_f32(soft, want[0], "mean embedding")
    alike(masses, want[1])
    assert dead == 1 or masses.best[0, 0, 0] == 3


def test_scores_are_exact_where_no_mass_is_left() -> None:
    """A soft cap of 30 at a temperature of 0.4 spans 150 nats; the exponential of a float32 ends at −103."""
    draw = np.random.default_rng(0)
    table = (draw.normal(0, 0.01, (64, 16)) + np.linspace(1, -1, 64)[:, None]).astype(np.float32)
    x = np.float32([3, -3])[None, :, None] * np.ones((1, 2, 16), np.float32)
    of, heat = np.arange(64, dtype=np.int32) // 4, np.float32([[0.4]])
    _, masses = ran(x, table, heat, of, 16)
    _, exact = NumpyOps("float64").class_head(x.astype(np.float64), table.astype(np.float64), 30.0, heat, of, 16)
    np.testing.assert_array_equal(masses.best, exact.best)
    assert exact.score.min() < -110
    np.testing.assert_allclose(masses.score, exact.score, rtol=1e-5, atol=1e-3)
    lost = exact.score < -104
    np.testing.assert_array_equal(masses.mass[lost], masses.score[lost])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model and its quantized forms."""
    root = tmp_path_factory.mktemp("classes")
    tiny_checkpoint(root, name="float", hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    for recipe in RECIPES[1:]:
        dgemma.convert(root / "float", root / recipe, recipe=recipe, workers=1)
    return root


def opened(folder: Path, name: str) -> Passes:
    return backends.open(name, Checkpoint.open(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_masses_are_those_of_torch(root: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PART", 1 << 15)  # parts of a small table too
    got, want = (opened(root / recipe, name) for name in ("onnx", "torch"))
    draw = np.random.default_rng(1)
    vocab = want.config.vocab_size
    of = np.where(draw.random(vocab) < 0.3, FREE, draw.integers(0, 9, vocab)).astype(np.int32)
    canvas, prompt = draw.integers(16, vocab, CANVAS).astype(np.int32), draw.integers(16, vocab, 30).astype(np.int32)
    found = []
    for passes in (got, want):
        with passes.home():
            some = [Classes(of=of, count=n, key=str(n)) for n in (9, 12)]
            found.append([loops.masses(passes, prompt.tolist(), canvas, classes) for classes in some])
    for one, two in zip(*found, strict=True):
        assert [x.dtype for x in one] == [np.float32, np.int32, np.float32, np.float32]
        alike(one, Masses(*map(np.asarray, two)))


class Anything:
    """A constraint that is none: every third position knows its token, the others draw inside a class."""

    def __init__(self, vocab: int, *, factors: bool) -> None:
        draw = np.random.default_rng(vocab)
        of = np.where(draw.random(vocab) < 0.2, FREE, draw.integers(0, 5, vocab)).astype(np.int32)
        self.classes, self.factors, self.log_accept = Classes(of=of, count=5, key="five"), factors, 0.0

    def begin(self, **_: Any) -> Anything:
        return self

    def choose(self, masses: Masses, *, uniforms: np.ndarray, held: np.ndarray, bound: float, greedy: bool) -> Chosen:
        share = np.exp(masses.mass.astype(np.float64))
        share /= share.sum(-1, keepdims=True)
        ends, rows = share.cumsum(-1), np.arange(len(held))
        label = np.minimum((ends <= uniforms[:, None]).sum(-1), 4)
        rest = (uniforms - (ends[rows, label] - share[rows, label])) / share[rows, label]
        known = (rows % 3 == 0) | (held != FREE)
        entropy = -(share * np.log(share)).sum(-1)
        return Chosen(
            token=np.where(known, masses.best[rows, label], FREE).astype(np.int32), label=label.astype(np.int32),
            rest=np.clip(rest, 0, 1 - 2.0**-24).astype(np.float32),
            argmax=masses.best[rows, masses.score.argmax(-1)], entropy=entropy.astype(np.float32),
            factors=np.tile(np.float32([1, 0.5, 2, 0, 1, 0.25]), (len(held), 1)) if self.factors else None,
        )  # fmt: skip

    def commit(self, argmax: np.ndarray) -> None:
        pass


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_generations_inside_a_choice_are_those_of_torch(root: Path, recipe: str, factors: bool) -> None:
    """Rows of one prompt and of another, of two temperatures, one greedy, one with held tokens, over three canvases."""
    want, got = (dgemma.load(root / recipe, backend=name, dtype="float32") for name in ("torch", "onnx"))
    draw = np.random.default_rng(2)
    vocab = want.config.vocab_size
    same, other = draw.integers(16, vocab, 20).tolist(), draw.integers(16, vocab, 33).tolist()
    held = np.where(draw.random(3 * CANVAS) < 0.3, draw.integers(16, vocab, 3 * CANVAS), FREE).tolist()
    limit, hot = Anything(vocab, factors=factors), dict(t_min=4.0, t_max=6.0, steps=4, entropy_bound=5.0)
    given = [
        (same, dict(seed=1, sampler=hot)), (same, dict(seed=2, held=held, sampler=hot)),
        (other, dict(seed=3, sampler=hot | dict(t_min=7.0, t_max=9.0))),
        (same, dict(seed=4, sampler=hot | dict(greedy=True))),
    ]  # fmt: skip
    given = [(prompt, options | dict(constraint=limit)) for prompt, options in given]
    for one, two in zip(generated(want, given), generated(got, given), strict=True):
        assert two[0] == one[0] and two[2].steps == one[2].steps
        for draft, mine in zip(one[1], two[1], strict=True):
            np.testing.assert_array_equal(mine.following, draft.following)
            assert_close_f32(mine.entropy, draft.entropy, "entropy")


@pytest.mark.parametrize("feedback", [0.0, 0.5])
def test_generations_inside_a_language_are_those_of_torch(root: Path, feedback: float) -> None:
    want, got = (dgemma.load(root / "float", backend=name, dtype="float32") for name in ("torch", "onnx"))
    draw = np.random.default_rng(5)
    vocab, given = want.config.vocab_size, []
    while len(given) < 6:
        automaton = random_automaton(draw, states=6, tokens=vocab, ends=bool(len(given) % 2), held_class=True)
        held = np.where(draw.random(2 * CANVAS) < 0.2, draw.integers(16, vocab, 2 * CANVAS), FREE)
        constraint = Constraint(automaton=automaton, feedback=feedback)
        try:
            constraint.begin(budget=2 * CANVAS, canvas_length=CANVAS, held=held)
        except DgemmaError:
            continue
        hot = dict(t_min=4.0, t_max=6.0, steps=3, entropy_bound=9.0)
        options = dict(seed=len(given), budget=2 * CANVAS, held=held.tolist(), sampler=hot, constraint=constraint)
        given.append((draw.integers(16, vocab, 9).tolist(), options))
    for one, two in zip(generated(want, given), generated(got, given), strict=True):
        assert two[0] == one[0] and two[2].log_accept == pytest.approx(one[2].log_accept, rel=1e-4)


def test_float16_and_other_writings(root: Path) -> None:
    """The graph is taken in both widths, in every way of writing; at half the width it errs as the oracle does."""
    checkpoint = Checkpoint.open(root / "4bit")
    vocab = checkpoint.config.vocab_size
    of, canvas = np.arange(vocab, dtype=np.int32) % 4, np.arange(20, 20 + CANVAS, dtype=np.int32)
    found = []
    for name, dtype in (("onnx", "float16"), ("numpy", "float16"), ("numpy", "float32")):
        passes = backends.open(name, checkpoint, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        with passes.home():
            classes = Classes(of=of, count=4, key="four")
            found.append(loops.masses(passes, canvas[:5].tolist(), canvas, classes))
    for name in ("mass", "score", "moment"):
        assert_low_precision(*(getattr(one, name) for one in found), name)
    for options in (dict(cpu=True), dict(portable=True), {}):
        for write in (graphs.classes_graph, graphs.embedding_graph):
            assert write(checkpoint.config, from_checkpoint(checkpoint), graphs.Options(**options)).graph.outputs


def test_scores_look_at_some_positions_alone(root: Path) -> None:
    passes = opened(root / "8bit", "onnx")
    draw = np.random.default_rng(4)
    vocab = passes.config.vocab_size
    canvases, tokens = draw.integers(16, vocab, (2, CANVAS)).astype(np.int32), np.array([3, 70, 21])
    slots = [passes.open(9, CANVAS) for _ in range(2)]
    passes.read([(slot, canvas[:9]) for slot, canvas in zip(slots, canvases, strict=True)])
    at = [(1, 3), (0, 0), (1, 15), *[(0, 4)] * 40]  # in more than one go
    got, want = passes.scores(slots, canvases, at, tokens), Passes.scores(passes, slots, canvases, at, tokens)
    np.testing.assert_array_equal(got.token, want.token)
    for name in ("log_p", "entropy", "top"):
        one, other = getattr(got, name), getattr(want, name)
        assert one.dtype == other.dtype == np.float32
        assert_close_f32(one, other, name)
