"""`dgemma export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..export.report import Report


@click.command(short_help="Write a checkpoint out as ONNX graphs.")
@click.argument("source")
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), metavar="DIR",
    help="The folder to make. By default the graphs are put beside the weights; nano needs one.",
)  # fmt: skip
@click.option("--opset", type=click.IntRange(23, 24), default=23, show_default=True, help="ONNX operator set.")
@click.option("--unified", is_flag=True, help="One graph for both passes.")
@click.option("--standalone", is_flag=True, help="Copy the weights, so that DIR can be moved anywhere.")
@click.option("--fp16", is_flag=True, help="Compute in float16.")
@click.option("--logits", is_flag=True, help="Give the denoising graph the output `logits`.")
@click.option("--cpu", is_flag=True, help="Write quantized products as CPUs do them fastest, instead of MatMulNBits.")
@click.option("--portable", is_flag=True, help="Operators of the ONNX standard only, for other runtimes.")
@click.option("--verify", is_flag=True, help="Run the graphs against SOURCE and print the error of each output.")
@click.option("--force", is_flag=True, help="Replace what an earlier export left, and nothing else.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the Hugging Face hub.")
@click.option("--json", "as_json", is_flag=True, help="Write the report as one JSON object.")
def export(source: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Write SOURCE, a checkpoint folder or a Hugging Face id, as graphs for ONNX Runtime.

    The weights stay in SOURCE's files, which the graphs refer to.

    \b
    dgemma export ./diffusiongemma-4bit
    dgemma export nano --out nano-onnx --standalone --verify
    """
    from ..tools.export import export as run
    from .output import consoles, put, put_lines

    console, errors = consoles()

    def say(line: str) -> None:
        if errors.is_terminal:
            put(errors, f"{line}\n")

    report = run(source, out, progress=say, **options)
    if as_json:
        click.echo(json.dumps(asdict(report) | {"path": str(report.path)}))
        return
    put_lines(console, describe(report))


def describe(report: Report) -> list[str]:
    """Say in a few lines what was made."""
    from ..show.frame import printable
    from .convert import amount

    graphs = ", ".join(f"{name}.onnx ({nodes} nodes)" for name, nodes in report.graphs.items())
    how = "copied" if report.copied else "the checkpoint's own files, not copied"
    lines = [
        f"{printable(str(report.path))}: {graphs}, {amount(report.graph_bytes)}",
        f"  weights: {amount(report.weight_bytes)}, {how}",
    ]
    if report.lacking:
        lines.append(f"  the onnxruntime installed here has no CPU kernel for {', '.join(report.lacking)}")
    if report.errors:
        lines.append("  largest error against the source in float32:")
        lines += [f"    {name}: {figure}" for name, figure in _figures(report.errors).items()]
    return lines


def _figures(errors: dict[str, float]) -> dict[str, str]:
    """Say an error of each output; a layer's keys and values, `present.N.key` and `present.N.value`, on one line."""
    lines: dict[str, str] = {}
    for name, error in errors.items():
        if name == "entropy":
            said = f"{error:.1e} nats"
        elif name in ("token", "argmax", "accepted", "next_canvas"):
            said = f"{error:.2%} of positions differ"
        else:
            said = f"NMSE {error:.1e}"
        layer, _, part = name.rpartition(".")
        if layer.startswith("present."):
            lines[layer] = ", ".join([*([lines[layer]] if layer in lines else []), f"{part} {said}"])
        else:
            lines[name] = said
    return lines
