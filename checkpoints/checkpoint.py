"""A published checkpoint folder: found by name, checked, and mapped into memory.

    config.json  generation_config.json?  tokenizer.json  chat_template.jinja?
    model.safetensors    or    model-00001-of-00011.safetensors …  model.safetensors.index.json

Nothing is copied: tensors are views of one memory map per file, which the operating system reads when a backend packs
them and may drop again at any time.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.config import GenerationConfig, ModelConfig
from ..core.errors import DgemmaError, quoted, shown
from ..core.ops import DType
from . import foreign, names, quantized, ties, weights
from .files import FULL, read_json
from .links import inside, present
from .names import Roles
from .quant import Format, QTensor
from .quantized import Packed, Quantization
from .safetensors import DTYPES, Entry, SafetensorsFile
from .shards import count, open_files

PACKAGED = ("nano",)
"""Checkpoints that come with the package, in `models/`."""

_WIDTHS: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint folder. Its weights have not been compared with its config before `check`."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    files: tuple[SafetensorsFile, ...]
    quantization: Quantization | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a folder's settings and the headers of its weight files; no weight is read.

        Raises:
            DgemmaError: the folder is no DiffusionGemma checkpoint, is incomplete, damaged, of a layout that has to be
                converted first, or holds only pickle files, which are never opened.
        """
        folder = Path(path)
        foreign.check_folder(folder)
        where = folder / "config.json"
        data = read_json(inside(folder, "config.json"))
        scheme = None
        if data.get("model_type") == "diffusion_gemma":
            if method := quantized.needs_conversion(data):
                raise DgemmaError(f"{shown(where)}: quantized by {quoted(method, 40)}, {_way_out(method)}")
            scheme = Quantization.from_config(data, shown(where))
        config = ModelConfig.from_hf(data, where=shown(where))
        generation = GenerationConfig()
        if present(where := folder / "generation_config.json"):
            generation = GenerationConfig.from_hf(read_json(inside(folder, where.name)), where=shown(where))
        return cls(path=folder, config=config, generation=generation, files=open_files(folder), quantization=scheme)

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored tensor of the text model, sorted: no image tower, no tied copies."""
        return tuple(sorted(self._roles.weights))

    @property
    def nbytes(self) -> int:
        """Bytes of those tensors as stored."""
        return sum(self._size(stored) for stored in self._roles.weights.values())

    @property
    def stored_dtype(self) -> DType:
        """The width that most of the weights have: of a quantized one its scales', and bfloat16 where those are bytes.

        What a quantized folder stores unquantized, its norms, can be wider than the model that was quantized.
        """
        total: Counter[DType] = Counter()
        for stored in self._roles.weights.values():
            if (packed := self._packed.get(stored)) is not None:
                scales = self._files[packed.parts["scales"]].entries[packed.parts["scales"]]
                total[_WIDTHS.get(scales.dtype, "bfloat16")] += math.prod(packed.shape)
            elif (entry := self._entry(stored)).dtype in _WIDTHS:
                total[_WIDTHS[entry.dtype]] += entry.nbytes // DTYPES[entry.dtype].itemsize
        return total.most_common(1)[0][0] if total else "float32"

    def tensor(self, name: str) -> np.ndarray | QTensor:
        """Return a stored tensor as a view of the mapped file, in its stored width (`ml_dtypes.bfloat16` for bf16).

        A quantized one comes as a QTensor of such views.
        """
        if name not in self._roles.weights:
            raise DgemmaError(f"{shown(self.path)}: the tensor {quoted(name)} is missing")
        return self._read(self._roles.weights[name])

    def parts(self, name: str) -> dict[str, tuple[SafetensorsFile, str]]:
        """Where a tensor lies, for whoever hands out places instead of bytes: the file of each part and its name there.

        The parts are `weight` and, of one that is quantized, `scales`, …
        """
        stored = self._roles.weights[name]
        places = self._packed[stored].parts if stored in self._packed else {"weight": stored}
        return {part: (self._files[one], one) for part, one in places.items()}

    def format(self, name: str) -> Format | None:
        """How a tensor is quantized, if it is."""
        packed = self._packed.get(self._roles.weights.get(name, ""))
        return packed.format if packed else None

    def check(self, config: ModelConfig | None = None) -> None:
        """Compare the stored tensors with what a config (by default the folder's own) needs.

        Raises:
            DgemmaError: the tensors that are missing, unknown, misshapen or not of a float width, in one line; or a
                tied copy that differs from its weight in what a sample shows.
        """
        needed = weights.shapes(config or self.config)
        roles = self._roles if config is None else names.assign(self._logical, needed)
        shape, width = [], []
        for name, stored in roles.weights.items():
            if (there := self._shape(stored)) != needed[name]:
                shape.append(f"{name} is {quoted(list(there), 30)}, expected {list(needed[name])}")
            elif stored not in self._packed and self._entry(stored).dtype not in _WIDTHS:
                width.append(f"{name} is {self._entry(stored).dtype}")
        faults = {
            "missing": [quoted(name) for name in needed if name not in roles.weights],
            "unknown": [f"{quoted(name)}{self._home(name)}" for name in roles.unknown],
            "misshapen": shape,
            "not float32, bfloat16 or float16": width,
        }
        found = {kind: items for kind, items in faults.items() if items}
        if found:
            # The first kind in full and the others counted: the line has to stay readable.
            first, *rest = found.items()
            also = ", ".join(f"{len(items)} {kind}" for kind, items in rest)
            said = f"{count(*first)}{f'; also {also}' if rest else ''}{foreign.hint(roles.unknown)}"
            raise DgemmaError(f"{shown(self.path)}: {said}")
        for name in roles.copies:
            self.check_copies(name, sample=True)

    def check_copies(self, name: str, *, sample: bool = False) -> None:
        """Compare a tensor with its tied copies, which this costs the reading of; see `ties.py`.

        Raises:
            DgemmaError: a copy has other values than the tensor, so they are not tied.
        """
        for copy in self._roles.copies.get(name, ()):
            ties.check(self._held(copy), self._held(self._roles.weights[name]), copy, name, self.path, sample=sample)

    def copied_bytes(self, name: str) -> int:
        """Bytes of the tied copies of a tensor."""
        return sum(self._size(copy) for copy in self._roles.copies.get(name, ()))

    @cached_property
    def _files(self) -> dict[str, SafetensorsFile]:
        """The file of each stored name."""
        return {name: file for file in self.files for name in file.entries}

    @cached_property
    def _packed(self) -> dict[str, Packed]:
        """Quantized tensors, by the name that they would have as floats. The image tower's are nobody's here."""
        if self.quantization is None:
            return {}
        entries = {name: file.entries[name] for name, file in self._files.items() if names.kind_of(name) != "image"}
        found = quantized.find(entries, self.quantization, shown(self.path))
        return {f"{module}.weight": one for module, one in found.items()}

    @cached_property
    def _logical(self) -> tuple[str, ...]:
        """All tensors, a quantized one as one."""
        parts = {stored for one in self._packed.values() for stored in one.parts.values()}
        return (*(name for name in self._files if name not in parts), *self._packed)

    @cached_property
    def _roles(self) -> Roles:
        return names.assign(self._logical, weights.shapes(self.config))

    def _held(self, stored: str) -> ties.Held:
        return ties.Held(self._read(stored))

    def _read(self, stored: str) -> np.ndarray | QTensor:
        if stored in self._packed:
            return self._packed[stored].read(lambda part: self._files[part].tensor(part))
        tensor = self._files[stored].tensor(stored)
        return tensor if tensor.ndim else tensor.reshape(1)  # a layer's scalar, which some write without a dimension

    def _shape(self, stored: str) -> tuple[int, ...]:
        return self._packed[stored].shape if stored in self._packed else self._entry(stored).shape or (1,)

    def _size(self, stored: str) -> int:
        return self._packed[stored].nbytes if stored in self._packed else self._entry(stored).nbytes

    def _entry(self, stored: str) -> Entry:
        return self._files[stored].entries[stored]

    def _home(self, stored: str) -> str:
        return f" in {self._files[stored].path.name}" if stored in self._files else ""


def _way_out(method: str) -> str:
    if method in quantized.CONVERTED:
        return "which does not run as it is; `dgemma convert` makes a folder that does"
    return f"which is not read; take {foreign.READABLE}"


def resolve(name: str | Path, *, revision: str | None = None, progress: Any = None) -> Path:
    """Find a checkpoint folder by name, downloading it if need be.

    Args:
        name: a packaged checkpoint ("nano"), an existing path, or a Hugging Face hub id "owner/name".
        revision: branch, tag or commit, for a hub id.
        progress: a tqdm class that draws the download in place of huggingface_hub's own bars.

    Raises:
        DgemmaError: nothing by that name, or a download that failed, with what to do about it.
    """
    name, text = _checked(name, revision)
    if text in PACKAGED and (isinstance(name, str) or not name.exists()):
        package = __name__.rpartition(".checkpoints.")[0]
        folder = Path(str(importlib.resources.files(package) / "models" / name))
        if not folder.is_dir():
            raise DgemmaError(f"{text}: the packaged model is missing from {shown(folder)}; install dgemma again")
        return _unrevised(folder, text, revision)
    try:
        path = Path(name).expanduser()
        here = text != "" and path.exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL, or of an unknown user
        path, here = Path(), False
    if here:
        return _unrevised(path, shown(path), revision)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise DgemmaError(
            f"no model {quoted(text)}: give {' or '.join(map(repr, PACKAGED))}, the path of a checkpoint folder, "
            "or a Hugging Face id such as 'google/diffusiongemma-26B-A4B-it'"
        )
    return _download(text, revision, progress)


def _checked(name: Any, revision: Any) -> tuple[str | Path, str]:
    """The name as text or a path, and as text."""
    if isinstance(name, os.PathLike) and isinstance(os.fspath(name), str):
        name = Path(name)
    if not isinstance(name, str | Path):
        raise DgemmaError(f"the model is {quoted(name, 40)}, expected a name, the path of a folder, or a hub id")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise DgemmaError(f"revision is {quoted(revision, 40)}, expected a branch, a tag or a commit")
    return name, str(name)


def _unrevised(path: Path, name: str, revision: str | None) -> Path:
    if revision is not None:
        raise DgemmaError(f"{name} is here and has no revisions, so {quoted(revision, 40)} is none; leave it out")
    return path


def _download(repo: str, revision: str | None, progress: Any) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    extra = {} if progress is None else {"tqdm_class": progress}
    hub = f"{repo}{'' if revision is None else f' at {quoted(revision, 40)}'}: "
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["*/*"],  # what lies in subfolders are other formats' copies
            **extra,
        )
    except errors.GatedRepoError:
        why = "access is gated: accept its terms on huggingface.co, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        why = "no such revision on the Hugging Face hub"
    except errors.RepositoryNotFoundError:
        why = "no such folder here and no such model on the Hugging Face hub; a private one needs `hf auth login`"
    except errors.LocalEntryNotFoundError:
        why = "not downloaded yet, and the Hugging Face hub cannot be reached; connect, or give a folder's path"
    except errors.OfflineModeIsEnabled:
        why = "not downloaded yet, and HF_HUB_OFFLINE forbids downloading; unset it, or give a folder's path"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        why = f"the Hugging Face hub answered {status}; " + (
            "run `hf auth login`" if status in (401, 403) else "try again later"
        )
    except OSError as error:
        full = error.errno in FULL
        why = "the disk is full; free space, or point HF_HOME at a larger disk" if full else _download_failed(error)
    except Exception as error:  # the HTTP client's own exceptions, whose package differs by huggingface_hub's version
        why = _download_failed(error)
    else:
        return Path(folder)
    raise DgemmaError(hub + why)


def _download_failed(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"the download failed: {type(error).__name__}: {quoted(said, 120)}"
