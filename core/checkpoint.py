"""A published checkpoint folder: found by name, checked, and mapped into memory.

    config.json  generation_config.json?  tokenizer.json  chat_template.jinja?
    model.safetensors    or    model-00001-of-00011.safetensors …  model.safetensors.index.json

Nothing is copied: tensors are views of one memory map per file, which the operating system reads when a backend packs
them and may drop again at any time.
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import weights
from .config import GenerationConfig, ModelConfig, read_json
from .errors import DgemmaError, quoted, shown
from .ops import DType
from .safetensors import DTYPES, SafetensorsFile

PACKAGED = ("nano",)
"""Checkpoints that come with the package, in `models/`."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WIDTHS: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint folder. Its weights have not been compared with its config before `check`."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    files: tuple[SafetensorsFile, ...]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a folder's settings and the headers of its weight files; no weight is read.

        Raises:
            DgemmaError: the folder is no DiffusionGemma checkpoint, is incomplete, damaged, quantized, or holds only
                pickle files, which are never opened.
        """
        folder = Path(path)
        if not folder.is_dir():
            kind = "not a folder" if folder.exists() else "no such folder"
            raise DgemmaError(f"{shown(folder)}: {kind}; a checkpoint is a folder with config.json and *.safetensors")
        where = folder / "config.json"
        data = read_json(_inside(folder, "config.json"))
        for key in ("quantization", "quantization_config"):
            if data.get(key) is not None and data.get("model_type") == "diffusion_gemma":
                raise DgemmaError(
                    f"{shown(where)}: {key} says that the weights are quantized, which is not supported yet; "
                    "use the bfloat16 original"
                )
        config = ModelConfig.from_hf(data, where=shown(where))
        generation = GenerationConfig()
        if _present(where := folder / "generation_config.json"):
            generation = GenerationConfig.from_hf(read_json(_inside(folder, where.name)), where=shown(where))
        return cls(path=folder, config=config, generation=generation, files=_open_files(folder))

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored tensor of the text model, sorted: no image tower, no tied copies."""
        return tuple(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of those tensors as stored."""
        return sum(file.entries[name].nbytes for name, file in self._places.items())

    @property
    def stored_dtype(self) -> DType:
        """The width that most of the weights have."""
        total: Counter[DType] = Counter()
        for name, file in self._places.items():
            entry = file.entries[name]
            if entry.dtype in _WIDTHS:
                total[_WIDTHS[entry.dtype]] += entry.nbytes // DTYPES[entry.dtype].itemsize
        return total.most_common(1)[0][0] if total else "float32"

    def tensor(self, name: str) -> np.ndarray:
        """Return a stored tensor as a view of the mapped file, in its stored width (`ml_dtypes.bfloat16` for bf16)."""
        if name not in self._places:
            raise DgemmaError(f"{shown(self.path)}: the tensor {quoted(name)} is missing")
        return self._places[name].tensor(name)

    def check(self, config: ModelConfig | None = None) -> None:
        """Compare the stored tensors with what a config (by default the folder's own) needs.

        Raises:
            DgemmaError: the tensors that are missing, unknown, misshapen or not of a float width, in one line.
        """
        needed = weights.shapes(config or self.config)
        missing = [name for name in needed if name not in self._places]
        extra = [name for name in self._places if name not in needed]
        shape, width = [], []
        for name, file in self._places.items():
            entry = file.entries[name]
            if name in needed and entry.shape != needed[name]:
                found = quoted(list(entry.shape), 30)
                shape.append(f"{name} is {found}, expected {list(needed[name])}")
            elif name in needed and entry.dtype not in _WIDTHS:
                width.append(f"{name} is {entry.dtype}")
        faults = {
            "missing": list(map(quoted, missing)),
            "unknown": [f"{quoted(name)} in {self._places[name].path.name}" for name in extra],
            "misshapen": shape,
            "not float32, bfloat16 or float16": width,
        }
        found = {kind: items for kind, items in faults.items() if items}
        if found:
            # The first kind in full and the others counted: the line has to stay readable.
            first, *rest = found.items()
            also = ", ".join(f"{len(items)} {kind}" for kind, items in rest)
            raise DgemmaError(f"{shown(self.path)}: {_count(*first)}{f'; also {also}' if rest else ''}")

    @cached_property
    def _places(self) -> dict[str, SafetensorsFile]:
        """The file of each text tensor."""
        needed = weights.shapes(self.config)
        places = {
            name: file for file in self.files for name in file.entries if name in needed or not weights.ignored(name)
        }
        return dict(sorted(places.items()))


def resolve(name: str | Path, *, revision: str | None = None, progress: Any = None) -> Path:
    """Find a checkpoint folder by name, downloading it if need be.

    Args:
        name: a packaged checkpoint ("nano"), an existing path, or a Hugging Face hub id "owner/name".
        revision: branch, tag or commit, for a hub id.
        progress: a tqdm class that draws the download in place of huggingface_hub's own bars.

    Raises:
        DgemmaError: nothing by that name, or a download that failed, with what to do about it.
    """
    text = str(name)
    if isinstance(name, str) and name in PACKAGED:
        package = __name__.rpartition(".core.")[0]
        folder = Path(str(importlib.resources.files(package) / "models" / name))
        if not folder.is_dir():
            raise DgemmaError(f"{name}: the packaged model is missing from {shown(folder)}; install dgemma again")
        return folder
    try:
        path = Path(name).expanduser()
        if text and path.exists():
            return path
    except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL, or of an unknown user
        path = Path()
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise DgemmaError(
            f"no model {quoted(text)}: give {' or '.join(map(repr, PACKAGED))}, the path of a checkpoint folder, "
            "or a Hugging Face id such as 'google/diffusiongemma-26B-A4B-it'"
        )
    return _download(text, revision, progress)


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
        full = error.errno is not None and error.errno in _FULL
        why = "the disk is full; free space, or point HF_HOME at a larger disk" if full else _download_failed(error)
    except Exception as error:  # the HTTP client's own exceptions, whose package differs by huggingface_hub's version
        why = _download_failed(error)
    else:
        return Path(folder)
    raise DgemmaError(hub + why)


def _download_failed(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"the download failed: {type(error).__name__}: {quoted(said, 120)}"


def _open_files(folder: Path) -> tuple[SafetensorsFile, ...]:
    single, index = _present(folder / _SINGLE), _present(folder / _INDEX)
    if single and index:
        raise DgemmaError(
            f"{shown(folder)}: holds both {_SINGLE} and {_INDEX}, and they may disagree; remove the one that is stale"
        )
    if single:
        return (SafetensorsFile.open(_inside(folder, _SINGLE)),)
    if not index:
        raise DgemmaError(_why_no_weights(folder))
    where = shown(folder / _INDEX)
    listed = _read_index(read_json(_inside(folder, _INDEX)), where)
    files = []
    owners: dict[str, str] = {}
    for file_name in sorted(set(listed.values())):
        file = SafetensorsFile.open(_inside(folder, file_name))
        for name in file.entries:
            if name in owners:
                raise DgemmaError(f"{where}: {quoted(name)} is in two files, {owners[name]} and {file_name}")
            owners[name] = file_name
        files.append(file)
    lost = [name for name, file_name in listed.items() if owners.get(name) != file_name]
    if lost:
        said = [f"{quoted(name)} in {listed[name]}" for name in lost]
        raise DgemmaError(f"{where}: {_count('not in the files it names', said)}")
    strays = [name for name in owners if name not in listed and not weights.ignored(name)]
    if strays:
        raise DgemmaError(f"{where}: {_count('in the files but not listed', list(map(quoted, strays)))}")
    return tuple(files)


def _read_index(data: dict[str, Any], where: str) -> dict[str, str]:
    """Return the file name of each tensor."""
    table = data.get("weight_map")
    if not isinstance(table, dict) or not table or not data.keys() <= {"weight_map", "metadata"}:
        raise DgemmaError(f"{where}: expected the keys weight_map (tensor names to file names) and metadata")
    for name, file_name in table.items():
        plain = isinstance(file_name, str) and re.fullmatch(r"\w[\w.-]{0,60}\.safetensors", file_name, re.ASCII)
        if not plain:
            raise DgemmaError(
                f"{where}: {quoted(name)} is said to be in {quoted(file_name, 40)}; "
                "expected the plain name of a .safetensors file in the same folder"
            )
    return table


def _why_no_weights(folder: Path) -> str:
    found = sorted(os.listdir(folder))
    shards = [name for name in found if name.endswith(".safetensors")]
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if shards:
        return f"{shown(folder)}: {len(shards)} .safetensors files but no {_INDEX}; download it, or name one {_SINGLE}"
    if pickles:
        return (
            f"{shown(folder)}: its weights are pickle files ({quoted(pickles[0])}), which are never opened because "
            "they can run code; get or save them as safetensors"
        )
    return f"{shown(folder)}: neither {_SINGLE} nor {_INDEX} in it"


def _inside(folder: Path, name: str) -> Path:
    """Return a file of the folder, refusing a link that leads out of it.

    Hugging Face's cache is made of such links: `models--o--n/snapshots/<commit>/f` → `models--o--n/blobs/<hash>`, which
    in turn may lead to a store shared by all repositories, `blobs/` beside them, known by its marker file.
    """
    path = folder / name
    try:
        real, base = path.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise DgemmaError(f"{shown(path)}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.11 and 3.12
        raise DgemmaError(f"{shown(path)}: {getattr(error, 'strerror', None) or 'not readable'}") from None
    roots = [base]
    repository = base.parent.parent
    if base.parent.name == "snapshots" and repository.name.startswith("models--"):
        roots.append(repository / "blobs")
        if (repository.parent / "blobs" / ".huggingface-shared-blobs").is_file():
            roots.append(repository.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise DgemmaError(f"{shown(path)}: a link out of the folder, to {shown(real)}; put the file itself there")
    if not stat.S_ISREG(mode):
        raise DgemmaError(f"{shown(path)}: not a regular file")
    return path


def _present(path: Path) -> bool:
    """Whether the folder has such an entry, be it a broken link, which is then refused by name."""
    return os.path.lexists(path)


def _count(what: str, items: list[str]) -> str:
    """Return "3 tensors missing: a, b, ...", with as many items as fit a line."""
    said = items[:1]
    for item in items[1:]:
        if len(", ".join([*said, item])) > 120:
            break
        said.append(item)
    more = ", ..." if len(items) > len(said) else ""
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''} {what}: {', '.join(said)}{more}"
