"""`dgemma convert`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..convert.converter import Report
    from ..convert.meter import Progress


@click.command(short_help="Convert or quantize a checkpoint.")
@click.argument("source")
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to make.",
)  # fmt: skip
@click.option(
    "--recipe", "-r", metavar="NAME",
    help="What each part of the model is stored in: bf16, 8bit, 4bit, 4bit-mlx, nvfp4, mxfp8 or keep.  "
    "[default: 4bit; keep, where SOURCE is quantized]",
)  # fmt: skip
@click.option(
    "--rules", type=click.Path(path_type=Path), metavar="FILE",
    help="A recipe of your own: TOML or JSON, globs over module paths and a format for each.",
)  # fmt: skip
@click.option("--mlx", is_flag=True, help="Make a folder that mlx-vlm loads as it is. Somewhat larger.")
@click.option("--requantize", is_flag=True, help="Allow weights that are quantized already to be rounded again.")
@click.option("--force", is_flag=True, help="Replace DIR, and throw away work begun there with other options.")
@click.option("--verify", is_flag=True, help="Afterwards read everything back and compare it with the source.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the Hugging Face hub.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
    help="For a GGUF file: a folder with the original tokenizer, instead of one rebuilt from the file.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes. By default one for each core.")
@click.option("--json", "as_json", is_flag=True, help="Write the report as one JSON object.")
def convert(source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Convert SOURCE, a checkpoint folder, a GGUF file or a Hugging Face id, into a folder that every backend loads.

    SOURCE can be bf16, f16 or f32; quantized by MLX; NVIDIA modelopt's NVFP4; compressed-tensors' NVFP4, FP8 or
    integers (W4A16); fp8 in blocks; GGUF, of which Q8_0, Q4_0, Q5_0, Q4_1, Q5_1 and MXFP4 are kept to the bit and
    K-quants need --requantize. Memory use stays small whatever its size. Interrupted, the same command goes on where
    it stopped.

    \b
    dgemma convert google/diffusiongemma-26B-A4B-it --out diffusiongemma-4bit
    dgemma convert ./checkpoint --recipe 8bit --out ./checkpoint-8bit --verify
    dgemma convert ./diffusiongemma-Q8_0.gguf --out ./diffusiongemma-q8
    """
    from ..convert import convert as run
    from .output import Wait, consoles, put_lines

    console, errors = consoles()
    try:
        with Wait(errors, "reading headers") as wait:
            report = run(source, out, progress=lambda one: wait.update(one.done, one.total, _figure(one)), **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    if as_json:
        click.echo(json.dumps(asdict(report) | {"path": str(report.path)}))
        return
    put_lines(console, describe(report))


def _figure(one: Progress) -> str:
    left = "" if one.seconds_left is None else f", {_time(one.seconds_left)} left"
    return f"{one.stage}: {amount(one.done)} of {amount(one.total)}, {one.rate / 1e6:.0f} MB/s{left}"


def amount(size: float) -> str:
    """Bytes in the unit that checkpoints are published in: 15.42 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def describe(report: Report) -> list[str]:
    """Say in a few lines what was made."""
    from ..show.frame import printable

    image = report.bytes - report.text_bytes
    many = ", ".join(f"{count} {how}" for how, count in sorted(report.counts.items()))
    lines = [
        f"{printable(str(report.path))}{'' if report.fresh else ' was there already, made by the same command'}",
        f"  recipe {report.recipe}, source layout {report.layout}, {_time(report.seconds)}",
        f"  {amount(report.text_bytes)} of text weights, {report.bits_per_weight:.2f} bits each"
        + (f"; {amount(image)} of image tower" if image else ""),
        f"  {report.quantized_share:.2%} of the parameters quantized; the recipe asks for {report.wanted_share:.2%}"
        if report.wanted_share
        else "  nothing is quantized, as the recipe says",
        f"  weights: {many}" + (f"; {report.dropped} left out" if report.dropped else ""),
    ]
    if report.worst[1]:
        lines.append(f"  largest relative error {report.worst[1]:.4f}, of {printable(report.worst[0])}")
    for name, why in list(report.fallbacks.items())[:8]:
        lines.append(f"  not as the recipe says: {printable(name)}: {why}")
    if len(report.fallbacks) > 8:
        lines.append(f"  and {len(report.fallbacks) - 8} more; the manifest lists them")
    if report.counts.get("requantized") or report.counts.get("dequantized"):
        lines.append("  weights that were quantized already have been rounded a second time (--requantize)")
    if report.verified:
        lines.append("  verified: every byte and every weight")
    return lines
