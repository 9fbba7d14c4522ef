"""A checkpoint folder in, a folder with ONNX graphs out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoints import safetensors
from ..checkpoints.checkpoint import Checkpoint, resolve
from ..checkpoints.files import read_bytes
from ..checkpoints.links import inside
from ..core.errors import DgemmaError, quoted, shown
from ..core.given import check_call, check_flags
from . import manifest
from .report import Report
from .target import choose, left, opened

OPSETS = (23, 24)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIED = (".json", ".jinja")
_MAX_COPIED = 1 << 28  # bytes; a tokenizer or an index of a real model has some tens of megabytes
_OUTDATED = ("dgemma-manifest.json", manifest.NAME)  # hashes of files as converted, and what is written anew


def export(
    source: str | Path,
    out: str | Path | None,
    *,
    opset: int,
    unified: bool,
    standalone: bool,
    fp16: bool,
    logits: bool,
    cpu: bool,
    portable: bool,
    force: bool,
    revision: str | None,
    progress: Callable[[str], None] | None,
    compare: Callable[[Path, Path], dict[str, float]] | None,
) -> Report:
    """Do what `dgemma.export` says. `compare` gives the errors of a folder's graphs against the source's folder."""
    began = time.perf_counter()
    check_call(progress)
    check_flags(unified=unified, standalone=standalone, fp16=fp16, logits=logits)
    check_flags(cpu=cpu, portable=portable, force=force)
    say = progress or (lambda line: None)
    _check_options(opset, cpu, portable, compare is not None)
    say("reading headers")
    original = Checkpoint.open(resolve(source, revision=revision))
    original.check()
    _check_formats(original)
    target = choose(out, original)
    if target.inside and standalone:
        raise DgemmaError("standalone makes a folder of its own; give another out than the source")
    options: dict[str, Any] = dict(opset=opset, logits=logits, cpu=cpu, portable=portable)
    options["dtype"] = "float16" if fp16 else "float32"
    copied = [] if target.inside else _copied(original, standalone)
    coming = {manifest.NAME, *(f"{name}.onnx" for name in (["unified"] if unified else ["encode", "denoise"]))}
    if not target.inside:
        coming |= {*copied, *([_SINGLE] if standalone else [file.path.name for file in original.files])}
    with opened(target, original, coming, force=force) as stage:
        for name in original.names:
            original.check_copies(name)  # which reads weights, and so comes behind all that can be known without
        checkpoint = original
        if not target.inside:
            say("copying weights" if standalone else "linking weights")
            _bring(original, stage, copied, standalone)
            checkpoint = Checkpoint.open(stage)
        made = _write(checkpoint, stage, say, unified, options)
    from .probe import has_fused_experts, lacking, require

    errors: dict[str, float] = {}
    if compare is not None:
        say("verifying")
        require(made.values())
        errors = compare(target.path, original.path)
    return Report(
        path=target.path, graphs={name: _nodes(model) for name, model in made.items()},
        weight_bytes=sum(file.size for file in Checkpoint.open(target.path).files), copied=standalone,
        graph_bytes=sum((target.path / f"{name}.onnx").stat().st_size for name in made),
        lacking=lacking(made.values()), fused_experts=has_fused_experts(), errors=errors,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _check_options(opset: int, cpu: bool, portable: bool, verify: bool) -> None:
    if opset not in OPSETS:
        raise DgemmaError(f"opset is {quoted(opset, 20)}, expected one of {', '.join(map(str, OPSETS))}")
    if cpu and portable:
        raise DgemmaError("cpu and portable are two ways to write the same products; give one of them")
    for what, package in {"writing": "onnx_ir", "checking": "onnx"}.items():
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise DgemmaError(f"{what} ONNX graphs needs {name}: pip install 'dgemma[onnx]'")
    if verify and find_spec("onnxruntime") is None:
        raise DgemmaError("verifying ONNX graphs needs onnxruntime: pip install 'dgemma[onnx]'")


def _check_formats(checkpoint: Checkpoint) -> None:
    from .weights import check

    for name in checkpoint.names:
        kind = checkpoint.format(name)
        if kind is not None:
            check(name, kind)


def _copied(checkpoint: Checkpoint, standalone: bool) -> list[str]:
    """The files of a checkpoint that its copy needs besides the weights: settings and tokenizer."""
    skipped = {*_OUTDATED, *([_INDEX] if standalone else [])}
    return [
        path.name
        for path in sorted(checkpoint.path.iterdir())
        if path.suffix in _COPIED and path.name not in skipped and not path.is_dir()
    ]


def _bring(checkpoint: Checkpoint, stage: Path, copied: list[str], standalone: bool) -> None:
    """Make a folder that is a checkpoint of its own: small files copied, weights linked or copied."""
    for name in copied:
        with (stage / name).open("xb") as file:
            file.write(read_bytes(inside(checkpoint.path, name), _MAX_COPIED))
    if standalone:
        tensors = {}
        for name in checkpoint.names:
            tensors |= {stored: file.tensor(stored) for file, stored in checkpoint.parts(name).values()}
        safetensors.write(stage / _SINGLE, tensors, {"format": "pt"})
        return
    for file in checkpoint.files:
        try:
            os.link(file.path.resolve(), stage / file.path.name)
        except OSError as error:
            raise DgemmaError(
                f"{shown(file.path)}: the weights cannot be linked to ({error.strerror}); export into the checkpoint's "
                "own folder, or with standalone, which copies them"
            ) from None


def _write(
    checkpoint: Checkpoint, stage: Path, say: Callable[[str], None], unified: bool, options: dict[str, Any]
) -> dict[str, Any]:
    import onnx_ir as ir

    from . import graphs
    from .check import check
    from .weights import from_checkpoint

    how = graphs.Options(**options)
    writers = {"encode": graphs.encode_graph, "denoise": graphs.denoise_graph}
    if unified:
        writers = {"unified": graphs.unified_graph}
    made, written = {}, {}
    for name, write in writers.items():
        say(f"writing {name}.onnx")
        made[name] = write(checkpoint.config, from_checkpoint(checkpoint), how)
        written[name] = ir.to_proto(made[name]).SerializeToString()
        path = stage / f"{name}.onnx"
        with path.open("xb") as file:
            file.write(written[name])
        check(path)
    tokenizer = [name for name in ("tokenizer.json", "chat_template.jinja") if (checkpoint.path / name).exists()]
    data = manifest.describe(checkpoint, made, written, tokenizer, how) | {"files": left(stage)}
    with (stage / manifest.NAME).open("x", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
    return made


def _nodes(model: Any) -> int:
    return sum(1 for _ in model.graph.all_nodes()) + sum(1 for one in model.functions.values() for _ in one.all_nodes())
