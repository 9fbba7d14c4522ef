"""The graphs: `core/model.py` run over ops that write ONNX, between named inputs and outputs.

encode   input_ids, position_ids, past_key_values.N.key|value → present.N.key|value
denoise  input_ids, position_ids, past_key_values.N.key|value, soft_embedding, temperature, uniform, noise,
         entropy_bound, held
         → token, argmax, entropy, accepted, next_canvas, next_soft_embedding, on request logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..checkpoints import weights
from ..core import model as definition
from ..core import sampler
from ..core.config import ModelConfig
from ..core.parts import KV, Cache, Model
from ..core.primitives import DType
from .arrays import Array, Size
from .graph import NUMPY, TYPES, Builder, opsets
from .ops import OnnxOps

IR_VERSION = 11  # what opset 23 came with
BATCH, LENGTH = "batch_size", "sequence_length"
PAST = {"full_attention": "past_length", "sliding_attention": "past_sliding_length"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is written, apart from the weights."""

    opset: int = 23
    dtype: DType = "float32"
    logits: bool = False
    """Whether denoise has the output `logits`, for whoever wants to look at them; the loop never does."""

    cpu: bool = False
    """Whether the graphs are for a CPU; see `packed.py`."""

    portable: bool = False
    """Whether they hold operators of the ONNX standard only."""

    def ops(self) -> OnnxOps:
        return OnnxOps(Builder(), self.dtype, opset=self.opset, cpu=self.cpu, portable=self.portable)


def encode_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return the graph that reads tokens into the cache; `get` as in `weights.build`."""
    ops = options.ops()
    ids, cache = _inputs(ops, config)
    model = _built(ops, config, get)
    written = definition.encode(ops, model, cache, ids)
    return _finish(ops, "encode", _present(written), options)


def denoise_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return the graph of one whole denoising step."""
    ops = options.ops()
    ids, cache = _inputs(ops, config)
    outputs = _step(ops, _built(ops, config, get), ids, cache, _step_inputs(ops, config), options)
    return _finish(ops, "denoise", outputs, options)


def unified_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return both in one graph, which denoises where `soft_embedding` has a length and else encodes.

    It has the inputs and the outputs of both. Those of the part that does not run are empty.
    """
    ops = options.ops()
    ids, cache = _inputs(ops, config)
    given = _step_inputs(ops, config)
    b = ops.builder
    made = []
    for name in ("encode", "denoise"):
        inner = ops.branch(Builder(outer=b, name=name))
        layers = tuple(KV(*map(inner.seen, layer)) for layer in cache.layers)
        own = Cache(layers, inner.seen(ops.asarray(cache.length)))
        model = _built(inner, config, get)
        if name == "encode":
            made.append((inner, _present(definition.encode(inner, model, own, inner.seen(ids)))))
        else:
            arrays = {key: inner.seen(one) for key, one in given.items()}
            made.append((inner, _step(inner, model, inner.seen(ids), own, arrays, options)))
    (encoder, present), (denoiser, step) = made
    wanted = present | step
    empty = {key: np.zeros((0,) * one.ndim, NUMPY[one.dtype]) for key, one in wanted.items()}
    branches = {}
    for name, inner, has in (("then_branch", denoiser, step), ("else_branch", encoder, present)):
        values = []
        for key, one in wanted.items():
            value = has[key].value if key in has else inner.builder.op("Identity", b.constant(empty[key]))
            value.type = ir.TensorType(TYPES[one.dtype])
            values.append(value)
        branches[name] = inner.builder.graph(values, name=inner.builder.name, opset=None)
    size = b.op("Shape", given["soft_embedding"].value, start=1, end=2)
    denoising = b.op("Squeeze", b.op("Greater", size, b.ints(0)))
    outputs = b.ops("If", denoising, outputs=len(wanted), **branches)
    named = {
        key: ops.array(value, tuple(Size.named(f"{key}.{i}") for i in range(one.ndim)), one.dtype)
        for (key, one), value in zip(wanted.items(), outputs, strict=True)
    }
    return _finish(ops, "unified", named, options)


def states_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return the denoising pass without its head: input_ids … soft_embedding, held → states, normed."""
    ops = options.ops()
    ids, cache = _inputs(ops, config)
    soft = ops.input("soft_embedding", ops.dtype, (BATCH, LENGTH, config.hidden_size))
    held = ops.input("held", "int32", (BATCH, LENGTH))
    x = definition.denoise(ops, _built(ops, config, get), cache, ids, soft, held)
    return _finish(ops, "states", {"states": x}, options)


def logits_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return what makes logits of such states: states → logits, soft-capped, before any temperature."""
    ops = options.ops()
    states = ops.input("states", ops.dtype, (BATCH, LENGTH, config.hidden_size))
    table = ops.pack(get(f"{weights.DECODER}.embed_tokens.weight"))
    return _finish(ops, "logits", {"logits": ops.logits(states, table, config.softcap)}, options)


def classes_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return the head for classes of tokens: states, temperature, classes, count → soft, mass, best, score, moment."""
    ops = options.ops()
    states = ops.input("states", ops.dtype, (BATCH, LENGTH, config.hidden_size))
    temperature = ops.input("temperature", "float32", (BATCH, 1))
    classes = ops.input("classes", "int32", (config.vocab_size,))
    count = ops.input("count", "int32", (1,))
    table = ops.pack(get(f"{weights.DECODER}.embed_tokens.weight"))
    soft, masses = ops.class_head(states, table, config.softcap, temperature, classes, count)
    return _finish(ops, "classes", {"soft": soft, **masses._asdict()}, options)


def embedding_graph(config: ModelConfig, get: Any, options: Options) -> ir.Model:
    """Return what makes mean embeddings of distributions: probabilities → soft."""
    ops = options.ops()
    probabilities = ops.input("probabilities", "float32", (BATCH, LENGTH, config.vocab_size))
    table = ops.pack(get(f"{weights.DECODER}.embed_tokens.weight"))
    return _finish(ops, "embedding", {"soft": ops.mean_embedding(probabilities, table)}, options)


def _built(ops: OnnxOps, config: ModelConfig, get: Any) -> Model:
    return weights.build(config, lambda name: ops.pack(get(name)))


def _inputs(ops: OnnxOps, config: ModelConfig) -> tuple[Array, Cache]:
    ids = ops.input("input_ids", "int32", (BATCH, LENGTH))
    positions = ops.input("position_ids", "int32", (BATCH, LENGTH))
    layers = []
    for i, layer in enumerate(config.layers):
        shape = (BATCH, layer.kv_heads, PAST[layer.kind], layer.head_dim)
        layers.append(KV(*(ops.input(f"past_key_values.{i}.{part}", ops.dtype, shape) for part in ("key", "value"))))
    # Positions are consecutive, so the first of a row says them all.
    start = ops.reshape(positions[:, :1], (ids.shape[0],))
    return ids, Cache(tuple(layers), start)


def _present(cache: Cache) -> dict[str, Array]:
    return {
        f"present.{i}.{part}": value
        for i, layer in enumerate(cache.layers)
        for part, value in zip(("key", "value"), layer, strict=True)
    }


def _step_inputs(ops: OnnxOps, config: ModelConfig) -> dict[str, Array]:
    return {
        "soft_embedding": ops.input("soft_embedding", ops.dtype, (BATCH, LENGTH, config.hidden_size)),
        "temperature": ops.input("temperature", "float32", (BATCH, 1)),
        "uniform": ops.input("uniform", "float32", (BATCH, LENGTH)),
        "noise": ops.input("noise", "int32", (BATCH, LENGTH)),
        "entropy_bound": ops.input("entropy_bound", "float32", (1,)),
        "held": ops.input("held", "int32", (BATCH, LENGTH)),
    }


def _step(
    ops: OnnxOps, model: Model, ids: Array, cache: Cache, given: dict[str, Array], options: Options
) -> dict[str, Array]:
    config = model.config
    soft, temperature, uniform, noise, bound, held = given.values()
    x = definition.denoise(ops, model, cache, ids, soft, held)
    token, argmax, entropy, mean = ops.vocab_head(x, model.embed_tokens, config.softcap, temperature, uniform)
    argmax, entropy, accepted, canvas = sampler.held_in(ops, held, bound, noise, token, argmax, entropy)
    outputs = {
        "token": ops.where(held < 0, token, held), "argmax": argmax, "entropy": entropy, "accepted": accepted,
        "next_canvas": canvas, "next_soft_embedding": mean,
    }  # fmt: skip
    if options.logits:
        outputs["logits"] = ops.logits(x, model.embed_tokens, config.softcap)
    return outputs


def _finish(ops: OnnxOps, name: str, outputs: dict[str, Array], options: Options) -> ir.Model:
    values = []
    for key, array in outputs.items():
        value = array.value
        value.name = key
        value.type = ir.TensorType(TYPES[array.dtype])
        value.shape = ir.Shape([one if isinstance(one, int) else str(one) for one in array.shape])
        values.append(value)
    graph = ops.builder.graph(values, name=name, opset=options.opset)
    functions = ops.builder.functions
    opsets(graph, functions)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dgemma", functions=functions)
