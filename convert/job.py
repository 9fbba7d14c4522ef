"""One conversion, decided to the byte: of what, into what, and what is said of it in the folder it makes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints import foreign, quantized
from ..checkpoints.checkpoint import Checkpoint, inside, open_files, resolve
from ..checkpoints.files import open_file, read_json
from ..checkpoints.gguf import GgufFile, find
from ..checkpoints.quant import Format
from ..checkpoints.quantized import Quantization
from ..checkpoints.safetensors import SafetensorsFile
from ..core.config import ModelConfig
from ..core.errors import DgemmaError, shown
from ..core.version import __version__
from .gguf_source import GgufSource, open_source
from .layouts import Source, read_source
from .plan import Item, Shard, decide, lay_out, wanted, written
from .recipes import DEFAULT, KEEP, RECIPES, Recipe

VERSION = 1
"""Of the bytes that a plan leads to; raised with any change of code that changes them."""

SAMPLES, SAMPLE = 256, 4096
"""So many runs of so many bytes tell whether a weight file's contents are still the same."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What tells a file from what it may be changed into, short of reading all of it."""

    size: int
    changed: int
    """Time of the last change, in ns."""
    header: str
    sample: str
    """SHA-256 of the header, and of runs of bytes spread over the file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion, decided to the byte."""

    name: str
    """What the source is called: a hub id, or the name of its folder."""
    folder: Path
    """Where it lies."""
    data: dict[str, Any]
    """config.json of the source."""
    config: ModelConfig
    source: Source
    files: tuple[SafetensorsFile, ...] | tuple[GgufFile, ...]
    gguf: GgufSource | None
    """What it is, where it is no folder."""
    marks: Mapping[str, Mark]
    recipe: Recipe
    mlx: bool
    items: tuple[Item, ...]
    shards: tuple[Shard, ...]

    @property
    def location(self) -> Path:
        """What `prepare` makes this job of again."""
        return self.gguf.path if self.gguf else self.folder

    @cached_property
    def text(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if not item.image)

    @property
    def parameters(self) -> int:
        return sum(item.parameters for item in self.text)

    @property
    def wanted_share(self) -> float:
        """Share of the text model's parameters that the recipe asks to quantize, groups that divide or not."""
        return sum(item.parameters for item in self.text if wanted(item.weight, self.recipe)) / self.parameters

    @property
    def share(self) -> float:
        """Share that is quantized."""
        return sum(item.parameters for item in self.text if item.format) / self.parameters

    @property
    def bits(self) -> float:
        return 8 * sum(item.nbytes for item in self.text) / self.parameters

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the manifest says of the source: the same for every copy of it."""
        files = {
            name: {"size": mark.size, "header_sha256": mark.header, "sample_sha256": mark.sample}
            for name, mark in self.marks.items()
        }
        config = hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()
        return {
            "name": self.name, "revision": _commit(self.folder), "layout": self.source.layout,
            "config_sha256": config, "files": files,
        }  # fmt: skip

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What tells this conversion from every other."""
        headers = hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()
        return {
            "version": VERSION,
            "source": {key: self.provenance[key] for key in ("config_sha256", "files")},
            "source_changed": {name: mark.changed for name, mark in self.marks.items()},
            "recipe": self.recipe.to_json(),
            "mlx": self.mlx,
            "target": headers,
        } | ({"tokenizer": self.gguf.tokenizer_hash} if self.gguf else {})

    @property
    def plan_hash(self) -> str:
        """The plan's, less the times."""
        plan = {key: value for key, value in self.plan.items() if key != "source_changed"}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def check_source(self) -> None:
        for file in self.files:
            if mark(file.path, _header(file)) != self.marks[file.path.name]:
                raise DgemmaError(
                    f"{shown(file.path)}: the source changed while it was being converted; "
                    "start over with --force when it is at rest"
                )


def prepare(
    source: str | Path,
    recipe: Recipe | None,
    *,
    revision: str | None = None,
    mlx: bool = False,
    requantize: bool = False,
    tokenizer: str | Path | None = None,
) -> Job:
    """Read a source's headers and decide everything.

    Without a recipe a quantized source is kept as it is, and a float one gets the default. `tokenizer` is a folder to
    take the tokenizer of a GGUF file from.

    Raises:
        DgemmaError: a source that is damaged or of no known layout, or a recipe that cannot be had from it.
    """
    folder, gguf = resolve(source, revision=revision), None
    if path := find(folder):
        gguf = open_source(path, None if tokenizer is None else Path(os.path.expanduser(tokenizer)).absolute())
        folder, files, data, config, found = path.absolute().parent, gguf.files, gguf.data, gguf.config, gguf.source
    else:
        foreign.check_folder(folder)
        if tokenizer is not None:
            raise DgemmaError(f"{shown(folder)}: a folder with a tokenizer of its own; --tokenizer is for GGUF files")
        data = read_json(inside(folder, "config.json"))
        config = ModelConfig.from_hf(data, where=shown(folder / "config.json"))
        files = open_files(folder)
        hinted = os.path.lexists(folder / "hf_quant_config.json")
        found = read_source(files, data, config, folder, hinted=hinted)
    recipe = recipe or (KEEP if any(one.quantized for one in found.text) else RECIPES[DEFAULT])
    items = decide(found, recipe, mlx=mlx, requantize=requantize)
    return Job(
        name=gguf.path.stem if gguf else _name(source, folder),
        folder=folder,
        data=data,
        config=config,
        source=found,
        files=files,
        gguf=gguf,
        marks={file.path.name: mark(file.path, _header(file)) for file in files},
        recipe=recipe,
        mlx=mlx,
        items=items,
        shards=lay_out(items, style="mlx" if any(item.format for item in items) else "pt"),
    )


def _header(file: SafetensorsFile | GgufFile) -> int | None:
    return file.header if isinstance(file, GgufFile) else None


def mark(path: Path, header: int | None = None) -> Mark:
    """Look at a file, whose header is of a known length, or of the one that safetensors files begin with.

    Raises:
        DgemmaError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            stat = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little") if header is None else header
            first = hashlib.sha256(file.read(min(length, stat.st_size))).hexdigest()
            digest = hashlib.sha256()
            for i in range(SAMPLES):
                file.seek(stat.st_size * i // SAMPLES)
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise DgemmaError(f"{shown(path)}: {error.strerror or error}") from None
    return Mark(size=stat.st_size, changed=stat.st_mtime_ns, header=first, sample=digest.hexdigest())


def make_config(job: Job) -> dict[str, Any]:
    """Return the source's config.json with the new quantization in place of the old."""
    data = {key: value for key, value in job.data.items() if key not in ("quantization", "quantization_config")}
    made = {item.weight.module: written(item.format, job.mlx) for item in job.items if item.format}
    if all(item.dtype == "BF16" for item in job.text if not item.format):
        data |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in data}
    text = data.get("text_config")
    if job.mlx and isinstance(text, dict) and "per_layer_config" in text:
        # mlx-vlm 0.7.10 knows only the older spelling of the full-attention layers.
        full = next(layer for layer in job.config.layers if layer.window is None)
        shape = {"global_head_dim": full.head_dim, "num_global_key_value_heads": full.kv_heads}
        data["text_config"] = {key: value for key, value in text.items() if key != "per_layer_config"} | shape
    if made:
        weigh: Counter[Format] = Counter()
        for item in job.items:
            if item.weight.module in made:
                weigh[made[item.weight.module]] += item.parameters
        usual = weigh.most_common(1)[0][0]
        entries = {name: kind.to_config() for name, kind in made.items() if kind != usual}
        data["quantization"] = data["quantization_config"] = usual.to_config() | entries
    return data


def make_manifest(
    job: Job, sums: Mapping[tuple[int, int], tuple[float, float]], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Say what was made, of what, how. No times and no paths: the same work gives the same bytes.

    Args:
        job: the work.
        sums: squared error and squared weights, by item and first row.
        files: size and hash by name.
    """
    errors: dict[int, list[tuple[float, float]]] = {}
    for (index, _), pair in sorted(sums.items()):
        errors.setdefault(index, []).append(pair)
    tensors = {}
    for index, item in enumerate(job.items):
        one: dict[str, Any] = {"how": item.how, "format": item.described, "shape": list(item.weight.shape)}
        if item.how not in ("stored", "carried"):
            one["error"] = float(f"{relative(errors[index]):.4g}")
        if item.fallback:
            one["fallback"] = item.fallback
        tensors[item.weight.name] = one
    dropped = job.source.dropped
    return {
        "tool": f"dgemma {__version__}",
        "plan": job.plan_hash,
        "source": job.provenance,
        "recipe": job.recipe.to_json(),
        "mlx": job.mlx,
        "quantized_share": round(job.share, 6),
        "bits_per_weight": round(job.bits, 6),
        "dropped": list(dropped) if len(dropped) <= 100 else len(dropped),
        "tensors": tensors,
        "files": dict(sorted(files.items())),
    }


def relative(sums: Sequence[tuple[float, float]]) -> float:
    """Return ‖ŵ − w‖ / ‖w‖ from sums of squares."""
    wrong, total = (sum(pair[i] for pair in sums) for i in (0, 1))
    return (wrong / total) ** 0.5 if total else 0.0


def check_result(job: Job, folder: Path) -> None:
    """Read the headers of a folder back: every tensor there, and as much of it quantized as the recipe says.

    A converter is known that skipped 88 % of a model in silence.

    Raises:
        DgemmaError: it is not what was decided: a fault of dgemma's.
    """
    fault = f"{shown(folder)}: not what was asked for, by a fault of dgemma's:"
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    entries = {name: file.entries[name] for file in checkpoint.files for name in file.entries}
    if entries.keys() != {name for shard in job.shards for name in shard.places}:
        raise DgemmaError(f"{fault} other tensors in its files than planned")
    where = folder / "config.json"
    scheme = Quantization.from_config(read_json(where), shown(where))
    packed = quantized.find(entries, scheme, shown(folder)) if scheme else {}
    for item in job.items:
        there = packed.get(item.weight.module)
        if (there.format if there else None) != (written(item.format, job.mlx) if item.format else None):
            raise DgemmaError(f"{fault} {item.weight.name} is not {item.described}")
    missed = [item for item in job.text if wanted(item.weight, job.recipe) and not item.format and not item.fallback]
    if missed:
        raise DgemmaError(f"{fault} the recipe quantizes {missed[0].weight.name}, which is {missed[0].described}")


def _name(source: str | Path, folder: Path) -> str:
    try:
        path = Path(source).expanduser().exists()
    except (OSError, RuntimeError):
        path = False
    if not path:
        return str(source)  # a hub id, or the name of a packaged model
    cache = folder.resolve().parent.parent.name
    return cache.removeprefix("models--").replace("--", "/") if _commit(folder) else folder.resolve().name


def _commit(folder: Path) -> str | None:
    """Return the commit of a folder in Hugging Face's cache."""
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" else None
