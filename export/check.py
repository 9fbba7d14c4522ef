"""onnx's own checker, over a graph as it was written."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import DgemmaError, quoted


def check(path: Path) -> None:
    """Read a graph's file back and check it in full, shapes inferred; nothing is read of the weights.

    They stand in as inputs of their types and shapes. The checker would refuse the files where they are hard links, as
    in a folder that shares them, or links into a cache; what is in them was checked when the checkpoint was opened.

    Raises:
        DgemmaError: what the checker finds.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        outside = [one for one in graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
        for one in outside:
            graph.initializer.remove(one)
            graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = quoted(" ".join(str(error).split()), 200)
        raise DgemmaError(f"{path.name}: onnx {onnx.__version__} finds it faulty: {said}") from None
