"""`dgemma.export`: graphs written, and, where it is asked for, compared with their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..export.report import Report


def export(
    source: str | Path,
    out: str | Path | None = None,
    *,
    opset: int = 23,
    unified: bool = False,
    standalone: bool = False,
    fp16: bool = False,
    logits: bool = False,
    cpu: bool = False,
    portable: bool = False,
    verify: bool = False,
    force: bool = False,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Write a checkpoint's graphs for ONNX Runtime: `encode.onnx`, `denoise.onnx` and `dgemma-onnx.json`.

    Args:
        source: a folder, original or converted; `nano`; or a Hugging Face hub id.
        out: the folder to make; by default the graphs are put beside the weights. Elsewhere on the same disk the weight
            files appear as hard links, so that nothing is copied. `nano`, a part of the package, needs one.
        opset: 23 or 24.
        unified: one graph, `unified.onnx`, with the inputs and outputs of both.
        standalone: copy the weights that the graphs read, and nothing else, into one file in `out`.
        fp16: compute in float16.
        logits: give denoise the output `logits`.
        cpu: write quantized products as a CPU does them fastest; the default is MatMulNBits, which every provider has.
        portable: write operators of the ONNX standard only, for other runtimes than ONNX Runtime.
        verify: compare the graphs with the source, run by another backend in float32.
        force: replace what an earlier export left, and nothing else; see `export/target.py`.
        revision: branch, tag or commit of a hub id.
        progress: called with a line for each stage.

    Raises:
        DgemmaError: what cannot be read, is quantized in a format without an exact operator, or cannot be written; or
            a graph that onnx's checker, which reads each as it was written, finds faulty.
    """
    from ..core.given import check_flags
    from ..export import exporter

    check_flags(verify=verify)
    compare = None
    if verify:
        from .verify_onnx import verify as compare
    return exporter.export(
        source, out, opset=opset, unified=unified, standalone=standalone, fp16=fp16, logits=logits, cpu=cpu,
        portable=portable, force=force, revision=revision, progress=progress, compare=compare,
    )  # fmt: skip
