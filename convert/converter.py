"""Convert a checkpoint: any known layout in, MLX's quantized layout out, streamed.

The plan is made from headers alone; then rows are read, encoded and written in place by a few workers, in runs of about
four million weights. Memory therefore does not depend on the size of the checkpoint, and the bytes written depend on
the source and the recipe only: not on the machine, the number of workers, or how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import ties
from ..checkpoints.checkpoint import inside
from ..checkpoints.files import FULL, read_bytes, read_json, why
from ..core.errors import DgemmaError, quoted, shown
from ..core.given import check_call, check_flags, check_path, integer
from . import recipes, target
from .crew import Crew, Here, Written, gather
from .encode import factor_of, runs
from .job import Job, check_result, make_config, make_manifest, prepare
from .meter import Meter, Progress
from .partial import HIDDEN, MANIFEST, Partial, finish, open_partial, tidy
from .plan import Item
from .stored import source_bytes
from .verify import file_hash, verify_job

SYNC_BYTES, SYNC_SECONDS = 256 << 20, 1.0  # what a kill costs at most
_INDEX = "model.safetensors.index.json"
_COPIED = (".json", ".jinja", ".model", ".txt")
_REPLACED = ("config.json", "hf_quant_config.json", _INDEX, MANIFEST, "dgemma-onnx.json")  # graphs name the old files
_LARGEST_COPY = 1 << 28  # bytes; a tokenizer has some tens of megabytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion has made."""

    path: Path
    recipe: str
    layout: str
    """Of the source: float, mlx, modelopt or compressed-tensors."""
    bytes: int
    """Of all tensors."""
    text_bytes: int
    """Of the text model's."""
    bits_per_weight: float
    """Of the text model."""
    quantized_share: float
    """Of the text model's parameters."""
    wanted_share: float
    """What the recipe asked for; it is more only by what `fallbacks` lists."""
    fallbacks: dict[str, str]
    """Weights that could not have the recipe's format, and why."""
    counts: dict[str, int]
    """Weights by what became of them: stored, cast, quantized, carried, requantized, dequantized."""
    dropped: int
    """Stored tensors left out: tied copies, and scales of activations."""
    worst: tuple[str, float]
    """The weight with the largest relative error."""
    seconds: float
    fresh: bool
    """False where the folder was there, finished, and nothing had to be done."""
    verified: bool


def convert(
    source: str | Path,
    out: str | Path,
    recipe: str | None,
    *,
    rules: str | Path | None,
    mlx: bool,
    requantize: bool,
    force: bool,
    verify: bool,
    revision: str | None,
    tokenizer: str | Path | None,
    workers: int | None,
    progress: Callable[[Progress], None] | None,
) -> Report:
    """Do what `dgemma.convert` says."""
    began = time.monotonic()
    out = target.absolute(out)
    check_flags(mlx=mlx, requantize=requantize, force=force, verify=verify)
    _check_given(workers, tokenizer, progress)
    threads = max(1, workers or _cores())
    meter = Meter(progress)
    fresh = False
    try:
        chosen = (
            recipes.read_rules(rules) if rules is not None else recipes.find(recipe) if recipe is not None else None
        )
        job = prepare(source, chosen, revision=revision, mlx=mlx, requantize=requantize, tokenizer=tokenizer)
        if rules is not None and (unused := job.recipe.unused([item.weight.module for item in job.text])):
            raise DgemmaError(f"{shown(rules)}: {quoted(unused[0], 60)} matches no module that is left to it")
        target.check(out, job, force=force)
        if force or not target.finished(out, job):
            fresh = True
            _make(job, out, force=force, threads=threads, meter=meter)
        tidy(out)
        if verify:
            verify_job(job, out, threads=threads, meter=meter)
        return _report(job, out, fresh=fresh, verified=verify, seconds=time.monotonic() - began)
    except OSError as error:
        where = shown(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | Path) else out)
        goes_on = ", and the same command goes on where it stopped" if error.errno in FULL else ""
        raise DgemmaError(f"{where}: {why(error)}{goes_on}") from None


def _check_given(workers: Any, tokenizer: Any, progress: Any) -> None:
    check_call(progress)
    if workers is not None:
        integer("workers", workers, 0, 1 << 12)
    if tokenizer is not None:
        check_path(tokenizer, "tokenizer")


def _make(job: Job, out: Path, *, force: bool, threads: int, meter: Meter) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if job.gguf:
        _ = job.gguf.companions  # made first: a tokenizer that cannot be rebuilt is found before the work
    with open_partial(out, job.plan, force=force) as partial:
        _check_space(job, partial)
        _check_copies(job, meter)
        partial.begin(job.shards)
        _check_blocks(job, partial, threads, meter)
        _fill(job, partial, threads, meter)
        job.check_source()
        _complete(job, partial, threads, meter)
        check_result(job, partial.folder)
        finish(partial, out, force=force)


def _check_copies(job: Job, meter: Meter) -> None:
    """Read the copies of tied weights, which are left out, to see that they are copies: at most as long as copying."""
    if job.source.copies:
        meter.start("comparing", sum(source_bytes(copy) for copy, _ in job.source.copies))
        for copy, one in job.source.copies:
            ties.check(copy, one, copy.name, one.name, job.folder)
            meter.advance(source_bytes(copy))


def _check_space(job: Job, partial: Partial) -> None:
    needed = sum(shard.size for shard in job.shards) - partial.allocated()
    if job.gguf:
        needed += sum(map(len, job.gguf.companions.values()))
    else:
        needed += sum(inside(job.folder, name).stat().st_size for name in _copied(job.folder))
    free = shutil.disk_usage(partial.folder).free
    if needed > free:
        where = shown(partial.folder.parent)
        raise DgemmaError(
            f"{where}: {needed / 1e9:.2f} GB more are needed on this disk, and {free / 1e9:.2f} GB are free"
        )


def _check_blocks(job: Job, partial: Partial, threads: int, meter: Meter) -> None:
    """Leave to be written again what the journal lists and the files do not hold."""
    known = {(i, start): stop for i, item in enumerate(job.items) for start, stop in runs(item)}
    for block in partial.blocks.keys() - known:
        partial.forget(block)
    here, blocks = Here(job, partial), sorted(partial.blocks)
    size = {block: source_bytes(job.items[block[0]].weight, known[block] - block[1]) for block in blocks}
    if blocks:
        meter.start("checking", sum(size.values()))

    def check(block: tuple[int, int]) -> bool:
        sound = here.check(*block, known[block])
        meter.advance(size[block])
        return sound

    with ThreadPoolExecutor(threads) as pool:
        for block, sound in zip(blocks, pool.map(check, blocks), strict=True):
            if not sound:
                partial.forget(block)


def _fill(job: Job, partial: Partial, threads: int, meter: Meter) -> None:
    """Encode what the journal does not list yet."""
    homes = {name: shard.name for shard in job.shards for name in shard.places}
    meter.start("converting", sum(source_bytes(item.weight) for item in job.items))
    waiting: deque[tuple[int, int, int, Future[Written]]] = deque()
    since, unsynced = time.monotonic(), 0

    def take() -> None:
        nonlocal since, unsynced
        index, start, stop, future = waiting.popleft()
        made = future.result()
        partial.touched |= {homes[one.name] for one in job.items[index].components}
        partial.note("block", index, start, made.wrong.hex(), made.total.hex(), made.digest)
        unsynced += made.size
        meter.advance(source_bytes(job.items[index].weight, stop - start))
        if unsynced >= SYNC_BYTES or time.monotonic() - since >= SYNC_SECONDS:
            partial.sync()
            since, unsynced = time.monotonic(), 0

    with gather(job, partial, threads) as crew, ThreadPoolExecutor(threads) as pool:
        try:
            for index, item in enumerate(job.items):
                todo = []
                for start, stop in runs(item):
                    if (index, start) in partial.blocks:
                        meter.advance(source_bytes(item.weight, stop - start), old=True)
                    else:
                        todo.append((start, stop))
                factor = _factor(item, index, partial, crew, pool) if todo else None
                for start, stop in todo:
                    if len(waiting) >= 3 * threads:
                        take()
                    waiting.append((index, start, stop, pool.submit(crew.encode, index, start, stop, factor)))
            while waiting:
                take()
        finally:
            pool.shutdown(cancel_futures=True)
            partial.sync()  # what is done is done, also where a later tensor is damaged


def _factor(item: Item, index: int, partial: Partial, crew: Crew, pool: ThreadPoolExecutor) -> float | None:
    """Return the global scale of an nvfp4 weight, for which all of it is read once more."""
    if item.factor == "none" or item.how == "carried":
        return None
    if index not in partial.factors:
        found = max(pool.map(lambda run: crew.largest(index, *run), runs(item)))
        partial.note("factor", index, factor_of(found).hex())
    return partial.factors[index]


def _complete(job: Job, partial: Partial, threads: int, meter: Meter) -> None:
    """Write what stands beside the weights, the manifest last."""
    table = {name: shard.name for shard in job.shards for name in shard.places}
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in job.items)},
        "weight_map": dict(sorted(table.items())),
    }
    small = {"config.json": _json(make_config(job)), _INDEX: _json(index)}
    if job.gguf:
        small |= job.gguf.companions
    else:
        small |= {name: read_bytes(inside(job.folder, name), _LARGEST_COPY) for name in _copied(job.folder)}
    if job.mlx and "generation_config.json" in small:
        settings = json.loads(small["generation_config.json"])
        # mlx-vlm takes a null for a value.
        small["generation_config.json"] = _json({key: one for key, one in settings.items() if one is not None})
    files: dict[str, dict[str, Any]] = {}
    for name, data in small.items():
        partial.save(name, data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    meter.start("hashing", sum(shard.size for shard in job.shards))
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda one: file_hash(partial.folder / one.name, meter.advance), job.shards)
        for shard, digest in zip(job.shards, digests, strict=True):
            files[shard.name] = {"size": shard.size, "sha256": digest}
    for name in partial.files.names():
        if name not in files and name != HIDDEN:
            partial.files.remove(name)
    partial.save(MANIFEST, _json(make_manifest(job, partial.blocks, files)))


def _copied(folder: Path) -> Iterator[str]:
    """Return the names of the settings, tokenizer, template and license files that go along."""
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _COPIED and path.name not in _REPLACED and not path.name.startswith(".")
        wanted = wanted or path.name.upper().startswith(("LICENSE", "NOTICE"))
        wanted = wanted and path.name.isprintable()  # the manifest lists names, and is text
        if wanted and not path.is_dir() and not (path.is_file() and path.stat().st_size > _LARGEST_COPY):
            yield path.name  # a broken link and a pipe too: who reads it refuses it by name


def _report(job: Job, out: Path, *, fresh: bool, verified: bool, seconds: float) -> Report:
    manifest = read_json(out / MANIFEST)
    errors = {name: one.get("error", 0.0) for name, one in manifest["tensors"].items()}
    worst = max(errors, key=lambda name: errors[name])
    return Report(
        path=out,
        recipe=job.recipe.name,
        layout=job.source.layout,
        bytes=sum(item.nbytes for item in job.items),
        text_bytes=sum(item.nbytes for item in job.text),
        bits_per_weight=job.bits,
        quantized_share=job.share,
        wanted_share=job.wanted_share,
        fallbacks={
            item.weight.name: f"{item.fallback}; kept in {item.described}" for item in job.items if item.fallback
        },
        counts=dict(Counter(item.how for item in job.items)),
        dropped=len(job.source.dropped),
        worst=(worst, errors[worst]),
        seconds=seconds,
        fresh=fresh,
        verified=verified,
    )


def _json(data: Any) -> bytes:
    try:
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a character, which only an escape can spell
        return (json.dumps(data, indent=2) + "\n").encode()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
