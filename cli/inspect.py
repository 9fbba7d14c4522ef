"""`dgemma inspect`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .convert import amount

if TYPE_CHECKING:
    from ..core.ops import DType
    from ..tools.inspect import Inspection

BACKENDS = ("torch", "mlx", "onnx", "numpy")


@click.command(short_help="Show what a checkpoint holds and needs.")
@click.argument("model", required=False)
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="Compute from a bare config.json instead.",
)  # fmt: skip
@click.option(
    "--recipe", "-r", metavar="NAME",
    help="Show what this recipe would make of it.  [default with --config: 4bit]",
)  # fmt: skip
@click.option("--rules", type=click.Path(path_type=Path), metavar="FILE", help="The same for a recipe of your own.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the Hugging Face hub.")
@click.option("--mlx", is_flag=True, help="As `convert --mlx` would write it.")
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, metavar="N",
              help="Tokens of prompt and answer to have room for.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object; sizes are in bytes.")
def inspect(
    model: str | None,
    config: Path | None,
    recipe: str | None,
    rules: Path | None,
    revision: str | None,
    mlx: bool,
    context: int,
    as_json: bool,
) -> None:
    """Show a checkpoint's parameters, bits per weight by part, and the memory that each backend needs.

    MODEL is a folder in any layout that `convert` reads, a GGUF file, a packaged model, or a Hugging Face id, of which
    nothing but the config is downloaded.
    """
    from ..convert import recipes
    from ..tools.inspect import ignored_in, inspect_config, inspect_folder, read_config

    ignored: tuple[str, ...] = ()
    if (model is None) == (config is None):
        raise click.UsageError("give MODEL or --config FILE, and not both")
    chosen = recipes.read_rules(rules) if rules else recipes.find(recipe) if recipe else None
    if config is not None:
        found = inspect_config(read_config(config), chosen or recipes.find(recipes.DEFAULT), mlx=mlx)
    else:
        where = _find(str(model), revision)
        if where.is_dir() or where.suffix.lower() == ".gguf":
            found = inspect_folder(where, chosen, mlx=mlx)
            ignored = ignored_in(where) if where.is_dir() else ()
        else:
            found = inspect_config(read_config(where), chosen or recipes.find(recipes.DEFAULT), mlx=mlx)
    from .machine import system

    machine, context = system(), min(context, found.config.max_positions)
    memory = {"total": machine["memory_bytes"], "free": machine["free_memory_bytes"]}
    if as_json:
        click.echo(json.dumps(to_json(found, context, memory) | {"ignored": list(ignored)}))
    else:
        from .output import consoles, put_lines

        console, _ = consoles()
        put_lines(console, [*describe(found, context, memory), *_left_out(ignored)])


def _find(model: str, revision: str | None) -> Path:
    """The folder of a model or, of one on the hub that is not downloaded, its config.json; weights are not fetched."""
    from ..checkpoints.checkpoint import PACKAGED, resolve
    from .fit import from_hub

    if model in PACKAGED or os.path.exists(os.path.expanduser(model)):
        return resolve(model, revision=revision)
    return from_hub(model, revision)


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def needed(found: Inspection, context: int) -> dict[str, int]:
    """Bytes that each backend needs on the CPU: weights, keys and values, and what computing takes, as `doctor` counts
    them."""
    from .fit import Described, need

    described = Described(where=Path(), config=found.config, stored=found.stored, file_bytes=None, quantized=found)
    return {
        name: need(described, dtype=_dtype(found, name), gpu=False, backend=name).total(context) for name in BACKENDS
    }


def _dtype(found: Inspection, backend: str) -> DType:
    """What a backend computes in by default, on the CPU."""
    from ..backends import native
    from ..runtime import auto_dtype

    return auto_dtype(found.config, found.stored, backend, partial(native, backend, "cpu"))


def not_on_onnx(found: Inspection) -> list[str]:
    """The formats that ONNX Runtime refuses; see `export.weights.check`."""
    formats = dict.fromkeys(one for part in found.parts for one in part.formats)
    return [one for one in formats if re.match("mxfp|nvfp|(affine|symmetric)[^48]", one)]


def _left_out(keys: Sequence[str], most: int = 8) -> list[str]:
    """Say which settings have no effect here, in one line."""
    more = f" and {len(keys) - most} more (all with --json)" if len(keys) > most else ""
    names = [key if key.isprintable() and len(key) <= 60 else ascii(key)[:60] for key in keys[:most]]
    return [f"  settings without effect here, ignored: {', '.join(names)}{more}"] if keys else []


def to_json(found: Inspection, context: int, memory: dict[str, int]) -> dict[str, object]:
    from ..tools.inspect import cache_size

    dtype, need = _dtype(found, BACKENDS[0]), needed(found, context)
    cache = cache_size(found.config, dtype)
    return {
        "layout": found.layout, "recipe": found.recipe or None, "parameters": found.parameters,
        "text_bytes": round(found.text_bytes), "image_bytes": found.image_bytes,
        "bits_per_weight": found.bits_per_weight,
        "parts": [asdict(part) | {"bits_per_weight": part.bits_per_weight} for part in found.parts],
        "dtype": dtype, "cache_bytes_fixed": cache.fixed, "cache_bytes_per_1000_tokens": 1000 * cache.per_token,
        "weights_bytes": {name: round(found.held(name, _dtype(found, name))) for name in BACKENDS},
        "needed_bytes": need,
        "context": context, "memory_bytes": memory["total"], "free_bytes": memory["free"],
        "fits": {name: size <= memory["free"] for name, size in need.items()},
    }  # fmt: skip


def describe(found: Inspection, context: int, memory: dict[str, int]) -> list[str]:
    from ..runtime import auto_dtype
    from ..tools.inspect import cache_size

    what = f"recipe {found.recipe}" if found.recipe else f"{found.layout} checkpoint"
    lines = [
        f"{what}: {count(found.parameters)} parameters, {amount(found.text_bytes)}, "
        f"{found.bits_per_weight:.2f} bits per weight"
        + (f"; image tower {amount(found.image_bytes)}" if found.image_bytes else ""),
        "",
        f"  {'part':<18} {'parameters':>14} {'size':>10} {'bits':>6}  stored as",
    ]
    for part in found.parts:
        if part.parameters:
            lines.append(
                f"  {part.name:<18} {part.parameters:>14,} {amount(part.bytes):>10} {part.bits_per_weight:>6.2f}  "
                f"{', '.join(part.formats)}"
            )
    if found.layout not in ("float", "mlx", "planned"):
        lines.append("  this layout does not run as it is; `dgemma convert` makes a folder that does")
    dtype, need = auto_dtype(found.config, found.stored), needed(found, context)
    lines += [
        "",
        f"  to compute in {dtype}, with {context:,} tokens of context, on the CPU; {amount(memory['free'])} of "
        f"{amount(memory['total'])} are free:",
        f"    {'':<6} {'weights':>10} {'cache':>10} {'in all':>10}",
    ]
    for name, size in need.items():
        own = _dtype(found, name)
        held, cache = found.held(name, own), cache_size(found.config, own)
        kept = cache.fixed + cache.per_token * context
        how = ", weights unpacked" if found.quantized and name == "numpy" else f", in {own}" if own != dtype else ""
        fits = "fits" if size <= memory["free"] else "does not fit"
        if name == "onnx" and not_on_onnx(found):
            fits, how = f"has no exact operators for {', '.join(not_on_onnx(found))}", ""
        lines.append(f"    {name:<6} {amount(held):>10} {amount(kept):>10} {amount(size):>10}  {fits}{how}")
    lines.append("  (`dgemma doctor` looks at GPUs, and takes --dtype)")
    return lines
