"""One graph in ONNX Runtime: options, execution provider, and runs that leave their results on the device.

Session options, and what they are for:
    disable_prepacking   on a CPU weights are multiplied where the file maps them. Packed for the processor's cache they
                         would be a second copy of the model in memory, and no faster with a canvas of rows; see
                         docs/onnx.md
    ConstantFolding off  where weights are quantized: scales are cast in every pass instead of being kept in float32
    FuseFp16Initializer… off  there too: of float16 scales it makes a graph that its own check refuses (seen in 1.32)
    allow_spinning off   threads that wait give the processor up; beside torch's or another session's they would take
                         it from those
    memory_arena_shrinkage  a run of `encode` gives its working memory back: it is followed by many of `denoise`, whose
                         own is on top of it
    enable_mem_pattern   off: a plan of all buffers at once took up to 0.2 GB more, and no pass was faster for it
    log_severity_level   errors only
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.safetensors import SafetensorsFile
from ...core.errors import DgemmaError, quoted, shown
from ...core.primitives import DType

if TYPE_CHECKING:
    import onnx_ir as ir

_HELD = ("FLOAT", "FLOAT16", "BFLOAT16", "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "INT64")
"""What weights may be in, by ONNX's names: whole bytes, and no text."""
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

    def __init__(self, inner: ort.InferenceSession, device: str, lent: Weights, *, rests: bool = False) -> None:
        """`lent` has to outlive the session. `rests`: other sessions run before this one does again, and its working
        memory is theirs meanwhile."""
        self._inner, self._lent = inner, lent
        self._how = ort.RunOptions()
        if rests:
            self._how.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))

    @property
    def device(self) -> tuple[str, int]:
        """Asks `run` to leave an output on the device."""
        return self._device

    def host(self) -> tuple[str, int]:
        """Asks `run` for an output on the host."""
        return ("cpu", 0)

    def run(self, feeds: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, ort.OrtValue]:
        """Run once.

        feeds   NumPy arrays, or values that a run returned
        places  the outputs that are wanted: a device for each, or the value to write into

        Raises:
            DgemmaError: the runtime fails, with what it says.
        """
        binding = self._inner.io_binding()
        try:
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
                else:
                    binding.bind_ortvalue_input(name, value)
            for name, place in places.items():  # a graph that others have edited may lack an output
                if isinstance(place, tuple):
                    binding.bind_output(name, *place)
                else:
                    binding.bind_ortvalue_output(name, place)
            self._inner.run_with_iobinding(binding, self._how)
        except Exception as error:  # the runtime's own exceptions have no common base but this
            raise DgemmaError(f"onnxruntime {ort.__version__}: {_first_line(error)}") from None
        return dict(zip(places, binding.get_outputs(), strict=True))


class Weights:
    """The files that graphs refer to, mapped once for all sessions of a model and for what reads its checkpoint.

    Left to themselves sessions map a file each, and a process that has run both kinds of pass counts it twice.
    """

    def __init__(self) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        self._values: dict[tuple[Any, ...], ort.OrtValue] = {}

    def lend(self, model: ir.Model, checkpoint: Checkpoint, options: ort.SessionOptions) -> None:
        """Give a session of a graph its weights."""
        import onnx_ir as ir

        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                options.add_initializer(name, self._value(value.const_value, checkpoint))

    def _file(self, path: str, checkpoint: Checkpoint) -> SafetensorsFile:
        """Return a file as a graph spells it, which has to be one of the checkpoint's own."""
        if path not in self._files:
            own = None
            with suppress(OSError, ValueError, RuntimeError):  # names that no file can have, and links in a circle
                real = Path(path).resolve()
                own = next((file for file in checkpoint.files if file.path.resolve() == real), None)
            if own is None:
                raise DgemmaError(
                    f"{shown(path)}: a graph wants it, and it is no weight file of the folder; export again"
                )
            self._files[path] = own
        return self._files[path]

    def _value(self, tensor: ir.ExternalTensor, checkpoint: Checkpoint) -> ort.OrtValue:
        if tensor.dtype.name not in _HELD:
            raise DgemmaError(
                f"{quoted(tensor.name or '', 60)}: a graph wants it in {tensor.dtype.name}, which no weight is in; "
                "export again"
            )
        path, start, size = str(tensor.path), tensor.offset or 0, tensor.nbytes
        shape = tensor.shape.numpy()
        key = (path, start, tensor.dtype, shape)
        if key not in self._values:
            file = self._file(path, checkpoint)
            if start < 0 or start + size > file.size:
                raise DgemmaError(f"{shown(file.path)}: a graph wants bytes behind its end; export again")
            raw = file.raw(start, size)
            lacking = tensor.dtype.name == "BFLOAT16"  # which NumPy has not
            array = raw.view(np.uint16 if lacking else tensor.dtype.numpy()).reshape(shape)
            if not array.flags.aligned:  # where MLX has written it: the runtime trusts what it is lent
                array = array.copy()
            if lacking:
                self._values[key] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
            else:
                self._values[key] = ort.OrtValue.ortvalue_from_numpy(array)
        return self._values[key]


def open_session(
    name: str, checkpoint: Checkpoint, graph: Path | None, dtype: DType, device: str, weights: Weights
) -> Session:
    """Load a graph, from its file or, where there is none, written on the spot.

    Raises:
        DgemmaError: onnx-ir is not installed, onnxruntime lacks an operator, or it does not take the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: dict[str, dict[str, str]] = {"CPUExecutionProvider": {}}
    if device == "cpu":
        options.add_session_config_entry("session.disable_prepacking", "1")
    else:
        providers = {"CUDAExecutionProvider": {"device_id": device.partition(":")[2] or "0"}, **providers}
    model = _written(name, checkpoint, dtype, cpu=device == "cpu") if graph is None else _read(graph)
    source: str | bytes = str(graph)
    if model is not None:
        from ...export import probe

        probe.require([model], providers)
        if device == "cpu":
            weights.lend(model, checkpoint, options)
    if graph is None and model is not None:
        import onnx_ir as ir

        source = ir.to_proto(model).SerializeToString()
        options.add_session_config_entry(_EXTERNAL, str(checkpoint.files[0].path.resolve().parent))
    off = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"] if checkpoint.quantization else []
    try:
        inner = ort.InferenceSession(source, options, providers=list(providers.items()), disabled_optimizers=off)
    except Exception as error:  # as above
        raise DgemmaError(f"onnxruntime {ort.__version__} does not take {name}: {_first_line(error)}") from None
    return Session(inner, device, weights, rests=name == "encode" and device == "cpu")


def _read(graph: Path) -> ir.Model | None:
    """Read an exported graph, where onnx-ir is installed; without it the runtime reads it, and maps the weights."""
    if find_spec("onnx_ir") is None:
        return None
    import onnx_ir as ir

    try:
        return ir.load(graph)  # weights stay in their files
    except Exception as error:  # protobuf's and onnx-ir's own
        raise DgemmaError(f"{shown(graph)}: not an ONNX graph: {_first_line(error)}") from None


def _written(name: str, checkpoint: Checkpoint, dtype: DType, *, cpu: bool) -> ir.Model:
    """Write a graph in memory."""
    if find_spec("onnx_ir") is None:
        raise DgemmaError(
            "writing ONNX graphs needs onnx-ir: pip install 'dgemma[onnx]', or export the folder elsewhere"
        )
    from ...export import graphs
    from ...export.weights import from_checkpoint

    write = {
        "encode": graphs.encode_graph, "denoise": graphs.denoise_graph, "states": graphs.states_graph,
        "logits": graphs.logits_graph, "classes": graphs.classes_graph, "embedding": graphs.embedding_graph,
    }[name]  # fmt: skip
    return write(checkpoint.config, from_checkpoint(checkpoint, in_memory=True), graphs.Options(dtype=dtype, cpu=cpu))


def _first_line(error: Exception) -> str:
    return quoted(str(error).strip().partition("\n")[0], 300)
