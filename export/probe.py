"""What the ONNX Runtime installed here can run, asked before a graph is given to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.errors import DgemmaError
from .graph import MICROSOFT, OWN

CPU = "CPUExecutionProvider"


def lacking(models: Iterable[ir.Model], providers: Collection[str] = (CPU,)) -> tuple[str, ...]:
    """Return the operators of graphs that the installed onnxruntime has no kernel for; none where none is installed.

    What is called a function is written out in other operators.
    """
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return ()
    known: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider in providers:
            known.setdefault((kernel.domain, kernel.op_name), []).append(kernel.version_range)
    missing = set()
    for model in models:
        for graph in (model.graph, *model.functions.values()):
            for node in graph.all_nodes():
                version = model.opset_imports.get(node.domain, 1)
                ranges = known.get((node.domain, node.op_type), [])
                if node.domain != OWN and node.op_type != "Constant" and not any(a <= version <= b for a, b in ranges):
                    missing.add(f"{node.domain or 'ai.onnx'}::{node.op_type}-{version}")
    return tuple(sorted(missing))


def require(models: Iterable[ir.Model], providers: Collection[str] = (CPU,)) -> None:
    """Refuse graphs that the installed onnxruntime cannot run.

    Raises:
        DgemmaError: the operators it lacks, and its version.
    """
    if missing := lacking(models, providers):
        import onnxruntime

        raise DgemmaError(
            f"onnxruntime {onnxruntime.__version__} has no kernel for {', '.join(missing)}; install 1.24 or newer"
        )


def has_fused_experts() -> bool:
    """Whether the installed onnxruntime's MoE knows gated experts with tanh-GELU, found out by running one.

    No release up to 1.31.1 does: it refuses the name of the activation.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    width, inner = 8, 4
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, width)).astype(np.float32)
    up = draw.normal(size=(1, 2 * inner, width)).astype(np.float32)
    down = draw.normal(size=(1, width, inner)).astype(np.float32)
    inputs = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))]
    stored = []
    for name, array in {"router": np.zeros((2, 1), np.float32), "up": up, "down": down}.items():
        tensor = ir.tensor(array, name=name)
        stored.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
    out = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    router, first, second = stored
    attributes = {"activation_type": "geglu", "k": 1}
    node = ir.node("MoE", [inputs[0], router, first, None, second], attributes, domain=MICROSOFT, outputs=[out])
    graph = ir.Graph(
        inputs, [out], nodes=[node], initializers=stored, opset_imports={"": 23, MICROSOFT: 1}, name="probe"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        got: Any = session.run(None, {"x": x})[0]
    except Exception:  # whatever it says, it has not got it
        return False
    gate, lift = np.split(x @ up[0].T, 2, -1)
    bent = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return bool(np.allclose(got, (bent * lift) @ down[0].T, rtol=1e-4, atol=1e-4))
