"""What every ONNX graph here is written with: nodes one after another, constants shared, weights left in their files.

onnx-ir holds the graph; this adds names, and constants that are equal become one. Types and shapes of intermediate
values are not recorded: `ops.py` knows them while it writes, and every runtime infers them again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Value = ir.Value

MICROSOFT = "com.microsoft"
OWN = "dgemma"
TYPES: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT64, "bool": ir.DataType.BOOL,
}  # fmt: skip
"""ONNX types by the contract's names. Integers are int64: every ONNX op that makes or takes an index has them so."""

NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int32": np.int64, "bool": np.bool_}


class Builder:
    """Writes one graph, or the body of a function or loop inside one.

    A function's body can hold no initializers, so its constants are nodes. A loop's body sees the values of the graph
    around it (`outer`), and puts its constants there.
    """

    def __init__(self, *, outer: Builder | None = None, function: bool = False, name: str = "body") -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, Value] = {}
        self._kinds: dict[Hashable, ir.Function] = {}
        self.inputs: list[Value] = []
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._outer = outer
        self._function = function
        self.name = name
        self._prefix = "" if outer is None else f"{outer._prefix}{name}{len(outer.nodes)}_"

    @property
    def functions(self) -> list[ir.Function]:
        """The model-local functions that are called."""
        return list(self._kinds.values())

    # ---- Values -----------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str] | None = None) -> Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))
        self.inputs.append(value)
        return value

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """Return a small constant, the same value for the same numbers."""
        if self._outer is not None:
            return self._outer.constant(array, dtype)
        array = np.asarray(array, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            if self._function:
                self._constants[key] = self.op("Constant", value=ir.tensor(array))
            else:
                self._constants[key] = self.initializer(f"constant_{len(self._constants)}", ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        return self.constant(values, np.int64)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> Value:
        """Return a weight; asked for twice by the same name, the same value."""
        if self._outer is not None:
            return self._outer.initializer(name, tensor)
        if name not in self.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            tensor.name = name
            self.initializers[name] = value
        return self.initializers[name]

    def root(self) -> Builder:
        return self if self._outer is None else self._outer.root()

    # ---- Nodes ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """Append a node of one output."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[Value, ...]:
        """Append a node of several outputs. Trailing inputs that are None are left out."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        name = f"{self._prefix}{kind}_{len(self.nodes)}"
        made = [ir.Value(name=name if outputs == 1 else f"{name}_{i}") for i in range(outputs)]
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=made, name=name))
        return tuple(made)

    def call(self, name: str, kind: Hashable, make: Callable[[str], ir.Function], *inputs: Value) -> Value:
        """Append a call of a model-local function; `make(name)` writes it where there is none of this kind yet.

        The first kind has the name alone, others a number behind it.
        """
        kinds = self.root()._kinds
        if kind not in kinds:
            kinds[kind] = make(f"{name}_{len(kinds) + 1}" if kinds else name)
        return self.op(kinds[kind].name, *inputs, domain=OWN)

    def graph(self, outputs: Sequence[Value], *, name: str, opset: int | None) -> ir.Graph:
        """Return the finished graph, or with no opset the body of a loop or the branch of an if."""
        nodes, values = self._needed(outputs)
        if opset is None:
            return ir.Graph(self.inputs, outputs, nodes=nodes, name=name)
        imports = _imports(nodes, opset)
        return ir.Graph(self.inputs, outputs, nodes=nodes, initializers=values, opset_imports=imports, name=name)

    def _needed(self, outputs: Sequence[Value]) -> tuple[list[ir.Node], list[Value]]:
        """What outputs depend on: nodes and initializers. All outputs of a node stay: Attention's are not optional."""
        wanted, nodes = {*outputs}, []
        for node in reversed(self.nodes):
            if wanted.isdisjoint(node.outputs):
                continue
            nodes.append(node)
            wanted.update(_read_by(node))
        return nodes[::-1], [value for value in self.initializers.values() if value in wanted]


def _read_by(node: ir.Node) -> Iterator[Value]:
    """Every value that a node reads, those that its loops and branches take from around them included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().outputs
            for one in attribute.as_graph():
                yield from _read_by(one)


def function(name: str, body: Builder, outputs: Sequence[Value], *, opset: int) -> ir.Function:
    """Wrap a body as a model-local function of the `dgemma` domain."""
    graph = ir.Graph(body.inputs, outputs, nodes=body.nodes, opset_imports=_imports(body.nodes, opset), name=name)
    return ir.Function(OWN, name, graph=graph, attributes=())


def _imports(nodes: Sequence[ir.Node], opset: int) -> dict[str, int]:
    """Every operator domain of the nodes, and of loops' bodies among them, with its version."""
    found = {"": opset}
    for node in nodes:
        if node.domain:
            found[node.domain] = 1
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                found |= _imports(list(attribute.as_graph()), opset)
    return found


def opsets(graph: ir.Graph, functions: Sequence[ir.Function]) -> None:
    """Import into a graph every domain that its functions need."""
    for one in functions:
        for domain, version in one.graph.opset_imports.items():
            graph.opset_imports.setdefault(domain, version)
