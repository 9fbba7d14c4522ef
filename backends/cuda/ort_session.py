"""One graph in ONNX Runtime: options, execution provider, and runs that leave their results on the device.

Session options, and what they are for:
    disable_prepacking   on a CPU weights are multiplied where the file maps them. Packed for the processor's cache they
                         would be a second copy of the model in memory, and no faster with a canvas of rows; see
                         docs/onnx.md
    ConstantFolding off  where weights are quantized: scales are cast in every pass instead of being kept in float32
    allow_spinning off   threads that wait give the processor up; beside torch's or another session's they would take
                         it from those
    log_severity_level   errors only
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...core.checkpoint import Checkpoint
from ...core.errors import DgemmaError, quoted
from ...core.ops import DType

_EXTERNAL = "session.model_external_initializers_file_folder_path"


def provider_of(device: str) -> str:
    """Return the device that a name stands for here: `cpu` or `cuda:N`."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "auto":
        return "cuda:0" if cuda else "cpu"
    if device == "cpu":
        return device
    if not cuda:
        raise DgemmaError(
            f"device {device!r} is not usable: this onnxruntime has no CUDA provider; install onnxruntime-gpu"
        )
    return device if ":" in device else f"{device}:0"


class Session:
    """A loaded graph on one device."""

    def __init__(self, inner: ort.InferenceSession, device: str) -> None:
        self._inner = inner
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self.outputs = tuple(one.name for one in inner.get_outputs())

    @property
    def device(self) -> tuple[str, int]:
        """Asks `run` to leave an output on the device."""
        return self._device

    def host(self) -> tuple[str, int]:
        """Asks `run` for an output on the host."""
        return ("cpu", 0)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), *self._device)

    def run(self, feeds: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, ort.OrtValue]:
        """Run once.

        feeds   NumPy arrays, or values that a run returned
        places  the outputs that are wanted: a device for each, or the value to write into

        Raises:
            DgemmaError: the runtime fails, with what it says.
        """
        binding = self._inner.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name, place in places.items():
            if isinstance(place, tuple):
                binding.bind_output(name, *place)
            else:
                binding.bind_ortvalue_output(name, place)
        try:
            self._inner.run_with_iobinding(binding)
        except Exception as error:  # the runtime's own exceptions have no common base but this
            raise DgemmaError(f"onnxruntime {ort.__version__}: {_first_line(error)}") from None
        return dict(zip(places, binding.get_outputs(), strict=True))


def open_session(name: str, checkpoint: Checkpoint, graph: Path | None, dtype: DType, device: str) -> Session:
    """Load a graph, from its file or, where there is none, written on the spot.

    Raises:
        DgemmaError: onnx-ir is not installed, or onnxruntime does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cpu = device == "cpu"
    if cpu:
        options.add_session_config_entry("session.disable_prepacking", "1")
    source: str | bytes = str(graph)
    if graph is None:
        source, folder = written(name, checkpoint, dtype, cpu=cpu)
        options.add_session_config_entry(_EXTERNAL, folder)
    off = ["ConstantFolding"] if checkpoint.quantization is not None else []
    providers: list[Any] = ["CPUExecutionProvider"]
    if not cpu:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    try:
        inner = ort.InferenceSession(source, options, providers=providers, disabled_optimizers=off)
    except Exception as error:  # as above
        raise DgemmaError(f"onnxruntime {ort.__version__} does not take {name}: {_first_line(error)}") from None
    return Session(inner, device)


def written(name: str, checkpoint: Checkpoint, dtype: DType, *, cpu: bool) -> tuple[bytes, str]:
    """Write a graph in memory; return it and the folder that its weights are in."""
    try:
        import onnx_ir as ir
    except ImportError:
        raise DgemmaError(
            "writing ONNX graphs needs onnx-ir: pip install 'dgemma[onnx]', or export the folder elsewhere"
        ) from None
    from ...export import graphs
    from ...export.weights import from_checkpoint

    write = {
        "encode": graphs.encode_graph, "denoise": graphs.denoise_graph, "states": graphs.states_graph,
        "logits": graphs.logits_graph,
    }[name]  # fmt: skip
    model = write(checkpoint.config, from_checkpoint(checkpoint, resolved=True), graphs.Options(dtype=dtype, cpu=cpu))
    return ir.to_proto(model).SerializeToString(), str(checkpoint.files[0].path.resolve().parent)


def _first_line(error: Exception) -> str:
    return quoted(str(error).strip().partition("\n")[0], 300)
