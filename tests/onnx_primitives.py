"""A whole denoising step written with ONNX primitives alone, and the same of NumPy's; draws for tests of graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dgemma.backends.numpy import NumpyOps
from dgemma.checkpoints import weights
from dgemma.core.config import ModelConfig
from dgemma.core.model import encode, new_cache, step
from dgemma.core.ops import Ops
from dgemma.core.parts import Draws
from dgemma.core.sampler import start
from dgemma.export.graph import Builder
from dgemma.export.primitives import PrimitiveOps
from tiny import TEXT_CONFIG, tiny_weights

PROMPT, LENGTH = 20, 16


def draws_of(
    ops: Ops, heat: np.ndarray, uniform: np.ndarray, noise: np.ndarray, bound: float, held: np.ndarray | None = None
) -> Draws:
    """Return a pass's draws, of rows with one entropy bound."""
    rows, held = len(noise), np.full(noise.shape, -1) if held is None else held
    return Draws(
        temperature=ops.asarray(np.broadcast_to(heat, (rows, 1)).copy()),
        uniforms=ops.asarray(uniform),
        noise=ops.asarray(noise, "int32"),
        entropy_bound=ops.asarray(np.full((rows, 1), bound, np.float32)),
        confidence=ops.asarray(np.zeros(rows, np.float32)),
        stability=ops.asarray(np.ones(rows, np.int32)),
        greedy=ops.asarray(np.zeros((rows, 1), bool)),
        held=ops.asarray(held, "int32"),
    )


class _Written(PrimitiveOps):
    """Small arrays as they are, so that the graph needs no files."""

    def pack(self, weight: Any) -> Any:
        return self.array(self.builder.constant(np.asarray(weight, np.float32)), weight.shape, "float32")


def plain_step() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return entropies, masks, tokens and caches of an encode pass and a step: those of the graph, and NumPy's."""
    config = ModelConfig.from_hf(
        {"model_type": "diffusion_gemma", "canvas_length": LENGTH, "text_config": TEXT_CONFIG, "eos_token_id": 1}
    )
    tensors = tiny_weights(config)
    draw = np.random.default_rng(0)
    feeds = {
        "prompt": draw.integers(6, 200, (2, PROMPT)), "canvas": draw.integers(6, 200, (2, LENGTH)),
        "noise": draw.integers(6, 200, (2, LENGTH)), "uniform": draw.random((2, LENGTH)).astype(np.float32),
    }  # fmt: skip

    held = np.where(draw.random((2, LENGTH)) < 0.3, draw.integers(6, 200, (2, LENGTH)), -1)

    def run(ops: Any, given: dict[str, Any]) -> dict[str, Any]:
        model = weights.build(config, lambda name: ops.pack(tensors[name]))
        cache = new_cache(ops, config, slots=2, capacity=PROMPT, scratch=PROMPT)
        cache = encode(ops, model, cache, given["prompt"])
        state = start(ops, given["canvas"], config.hidden_size)
        draws = Draws(
            temperature=ops.asarray(np.full((2, 1), 5.0), "float32"),  # see test_onnx.check
            uniforms=given["uniform"],
            noise=given["noise"],
            entropy_bound=ops.asarray(np.array([[3.0], [4.0]]), "float32"),
            confidence=ops.asarray(np.array([0.0, 9.0]), "float32"),
            stability=ops.asarray(np.array([1, 0]), "int32"),
            greedy=ops.asarray(np.array([[False], [True]]), "bool"),
            held=ops.asarray(held, "int32"),
        )
        for _ in range(2):
            state = step(ops, model, cache, state, draws)
        kept = {}
        for i, (one, layer) in enumerate(zip(cache.layers, config.layers, strict=True)):
            rows = PROMPT if layer.window is None else min(PROMPT, layer.window - 1)
            kept |= {f"{part}{i}": array[:, :, :rows] for part, array in zip("kv", one, strict=True)}
        return kept | {name: getattr(state, name) for name in ("canvas", "argmax", "entropy", "soft", "stable", "stop")}

    ops = _Written(Builder())
    kinds = {"prompt": "int32", "canvas": "int32", "noise": "int32", "uniform": "float32"}
    made = run(ops, {name: ops.input(name, kinds[name], array.shape) for name, array in feeds.items()})
    outputs = []
    for name, array in made.items():
        value = ops.builder.op("Cast", array.value, to=int(ir.DataType.FLOAT))
        value.name, value.type = f"made {name}", ir.TensorType(ir.DataType.FLOAT)
        outputs.append(value)
    graph = ops.builder.graph(outputs, name="step", opset=23)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(ir.Model(graph, ir_version=11))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(made)
    got = dict(zip(names, session.run(None, feeds), strict=True))
    plain = NumpyOps("float32")
    given = {name: plain.asarray(array, kinds[name]) for name, array in feeds.items()}  # type: ignore[arg-type]
    return got, {name: np.asarray(array, np.float32) for name, array in run(plain, given).items()}
