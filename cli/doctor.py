"""`dgemma doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from ..backends import MODULES, available, choose
from ..core.errors import DgemmaError
from .options import Command, model_options

if TYPE_CHECKING:
    from ..core.ops import DType


@click.command(cls=Command, short_help="Say what this machine can run.")
@model_options
@click.option(
    "--context", type=click.IntRange(min=1), default=4096, show_default=True, metavar="N",
    help="Tokens of prompt and answer together that the model has to have room for.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Write the report as one JSON object; sizes are in bytes.")
@click.pass_context
def doctor(
    ctx: click.Context, model: str, revision: str | None, backend: str, device: str, dtype: str, context: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Say what is installed, what `auto` means here, and whether a model fits this machine.

    --model also takes the path of a bare config.json. Nothing but a config is ever downloaded. The exit code is 1
    if no backend works or the model does not fit.
    """
    from .output import Wait, consoles, put_lines

    out, errors = consoles()
    with Wait(errors, "asking the frameworks"):
        report = examine(model, revision=revision, backend=backend, device=device, dtype=dtype, context=context)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for label, lines in _sections(report):
            for i, line in enumerate(lines):
                out.print(f"{'' if i else label:<10}", end="", style="bold", markup=False)
                put_lines(out, [line], indent=10)
    if report["problems"]:
        ctx.exit(1)


def examine(
    model: str, *, revision: str | None = None, backend: str, device: str, dtype: str, context: int
) -> dict[str, Any]:
    """Collect the report; what is wrong with the machine or the model is in `problems`."""
    from . import machine

    frameworks = machine.frameworks()
    report: dict[str, Any] = {
        "dgemma": machine.package_version(), "system": machine.system(), "frameworks": frameworks,
        "backends": {}, "hub_cache": machine.hub_cache(), "chosen": None, "model": None, "problems": [],
    }  # fmt: skip
    for name, reason in available().items():
        found = frameworks.get(MODULES[name], {"error": "not installed"})
        report["backends"][name] = {"version": found.get("version"), "error": reason or found.get("error")}
    if all(one["error"] for one in report["backends"].values()):
        report["problems"].append("no backend works")
    try:
        chosen, why = choose(backend), _why(backend, frameworks)
        if error := report["backends"][chosen]["error"]:
            raise DgemmaError(f"backend {chosen!r} does not work: {error}")
        gpu = _gpu(chosen, device, frameworks)
        report["chosen"] = {"backend": chosen, "device": gpu["device"] if gpu else "cpu", "why": why}
        native = frameworks.get(chosen, {}).get("native") if gpu is None else None
        report["model"] = _fit(
            model, revision, chosen, gpu, native, dtype, context, report["system"]["free_memory_bytes"]
        )
        report["chosen"]["dtype"] = report["model"]["dtype"]
        if not report["model"]["fits"]:
            report["problems"].append(f"{model} does not fit")
    except DgemmaError as error:
        report["problems"].append(str(error))
    return report


def _fit(
    model: str,
    revision: str | None,
    backend: str,
    gpu: dict[str, Any] | None,
    native: Sequence[DType] | None,
    dtype: str,
    context: int,
    free_memory: int,
) -> dict[str, Any]:
    from .fit import describe, judge

    described = describe(model, revision=revision)
    width = described.auto_dtype(backend, native) if dtype == "auto" else cast("DType", dtype)
    free = gpu["free"] if gpu else free_memory
    result = judge(described, dtype=width, gpu=gpu is not None, backend=backend, free=free, context=context)
    return {"name": model} | result


def _why(backend: str, frameworks: dict[str, Any]) -> str:
    if backend != "auto":
        return "asked for"
    if sys.platform == "darwin" and choose() == "mlx":
        return "Apple silicon"
    absent = [name for name in ("torch", "mlx") if name not in frameworks]
    return "not Apple silicon" if choose() == "torch" else f"{' and '.join(absent)} not installed"


def _gpu(backend: str, device: str, frameworks: dict[str, Any]) -> dict[str, Any] | None:
    """The GPU that a device name stands for, None for the CPU.

    Raises:
        DgemmaError: there is no such device.
    """
    cards = frameworks.get(MODULES[backend], {}).get("gpus", [])
    if device == "cpu" or (device == "auto" and not cards):
        return None
    wanted = {"auto": "", "cuda": "cuda:0"}.get(device, device)
    for card in cards:
        if card["device"].startswith(wanted):
            return card
    names = ", ".join(["auto", "cpu", *(card["device"] for card in cards)])
    raise DgemmaError(f"device {device!r} is not one that {backend} has here; choose from {names}")


def _sections(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The report for people: labels, and lines behind them."""
    from .output import size

    system, cache = report["system"], report["hub_cache"]
    cards = [
        f"{card['name']} ({card['device']}), {size(card['total'])}, {size(card['free'])} free"
        for found in report["frameworks"].values()
        for card in found["gpus"]
    ]
    cores = f"{system['cores']} cores, " if system["cores"] else ""
    backends = [f"{name:<6} {one['error'] or 'works, ' + one['version']}" for name, one in report["backends"].items()]
    products = _products(report["frameworks"].get("torch", {}).get("native"))
    sections = [
        ("dgemma", [f"{report['dgemma']} on Python {system['python']}, {system['os']}, {system['machine']}"]),
        ("CPU", [f"{system['cpu']}, {cores}{system['threads']} threads", *_listed(system["features"]), *products]),
        ("memory", [f"{size(system['memory_bytes'])}, {size(system['free_memory_bytes'])} free"]),
        ("GPU", cards or ["none that an installed framework can use"]),
        ("backends", backends),
        ("downloads", [f"{cache['path']}, {size(cache['free_bytes'])} free"]),
    ]
    if chosen := report["chosen"]:
        width = f", {chosen['dtype']}" if "dtype" in chosen else ""
        sections.append(("would use", [f"{chosen['backend']} on {chosen['device']}{width} ({chosen['why']})"]))
    if report["model"]:
        sections.append(("model", _model_lines(report["model"])))
    if report["problems"]:
        sections.append(("PROBLEM" if len(report["problems"]) == 1 else "PROBLEMS", report["problems"]))
    return sections


def _products(native: Sequence[str] | None) -> list[str]:
    """What torch multiplies on the CPU; None where it did not say."""
    if native is None:
        return []
    if native:
        return [f"torch multiplies float32 and, faster, {' and '.join(native)}; auto takes the width that is stored"]
    return ["torch multiplies float32 here and emulates bfloat16: auto takes float32, over weights as they are stored"]


def _listed(names: list[str]) -> list[str]:
    return [", ".join(names)] if names else []


def _model_lines(found: dict[str, Any]) -> list[str]:
    from .output import size

    count, context = found["parameters"], f"{found['context']:,} tokens"
    number = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    stored = "weights not here" if found["file_bytes"] is None else f"{size(found['file_bytes'])} on disk"
    form = f"quantized, {found['bits_per_weight']:.2f} bits each" if found["quantized"] else found["stored_dtype"]
    lines = [f"{found['name']}: {number} parameters, stored as {form}, {stored}"]
    if found["path"] != found["name"]:
        lines.append(found["path"])
    by_dtype = found["weights_bytes_by_dtype"]
    cache, windows = size(found["cache_bytes_per_1000_tokens"]), size(found["cache_bytes_fixed"])
    how = " stay packed:" if found["packed"] else " are unpacked:" if found["quantized"] else ""
    lines += [
        f"weights{how} {', '.join(f'{size(by_dtype[name])} in {name}' for name in ('float32', 'bfloat16'))}",
        f"cache {cache} per 1,000 tokens, and {windows} for sliding windows and what is being read",
        f"working memory about {size(found['working_bytes'])}",
    ]
    needed = f"{size(found['needed_bytes'])} of {size(found['free_bytes'])} free, in {found['dtype']} with {context}"
    if found["fits"]:
        return [*lines, f"FITS: {needed}; there is room for {found['largest_context']:,}"]
    lines.append(f"DOES NOT FIT: {needed}")
    for remedy in found["remedies"]:
        amount = f"{remedy['tokens']:,} tokens" if "tokens" in remedy else size(remedy["bytes"])
        lines.append(f"would do: {remedy['what']}, {amount}")
    return lines
