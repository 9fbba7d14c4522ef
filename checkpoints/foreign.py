"""What a path is that is no checkpoint of ours: one line that names it, and what to do that will be accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import DgemmaError, quoted, shown
from .links import present

WANTED = "a checkpoint is a folder with config.json, tokenizer.json and *.safetensors"
READABLE = "one that is not quantized, or in MLX's layout, NVFP4, FP8 or W4A16"
_GGUF = "which does not run as it is; `dgemma convert` makes a folder that does, of K-quants with --requantize"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors", re.ASCII)

_NO_ENTRY = "quantized, but config.json does not say how: get the folder's own config.json"
# Marks in tensor names: what others' quantizers and trainers leave, and what each is.
_MARKS = {
    r"\.(qweight|qzeros|g_idx)$": f"quantized by GPTQ or AWQ, which is not read; take {READABLE}",
    r"\.(absmax|quant_map|SCB|quant_state)\b": f"quantized by bitsandbytes, which is not read; take {READABLE}",
    r"\blora_[AB]\b": "a LoRA adapter's; merge it into its model (PEFT's merge_and_unload) and save that",
    r"\.experts\.\d+\.\w+(\.weight)?$": "experts one by one, which `dgemma convert` joins",
    r"\.(scales|biases|weight_(scale|packed)\w*)$": _NO_ENTRY,
}


def _no_folder(path: Path) -> DgemmaError:
    """Return the error for a path that is not a folder."""
    where, name = shown(path), path.name.lower()
    if not path.exists():
        lost = "a link to what is not there" if path.is_symlink() else "no such folder"
        return DgemmaError(f"{where}: {lost}; {WANTED}")
    if name.endswith(".gguf"):
        what = f"a GGUF file, {_GGUF}"
    elif name.endswith(".safetensors") and present(path.parent / "config.json"):
        what = f"one file of a checkpoint; give the folder, {shown(path.parent)}"
    elif name.endswith(_PICKLES):
        what = f"a pickle file, which is never opened because it can run code; {WANTED}"
    else:
        what = f"not a folder; {WANTED}"
    return DgemmaError(f"{where}: {what}")


def check_folder(folder: Path) -> None:
    """Refuse what is no folder, or has no config.json, by what it is instead.

    Raises:
        DgemmaError: so it is.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    if present(folder / "config.json"):
        return
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise DgemmaError(f"{shown(folder)}: {error.strerror or error}") from None
    what = _named(folder, found)
    if what is None and not found:
        what = f"an empty folder; {WANTED}"
    if what is None and (inner := [name for name in found if present(folder / name / "config.json")]):
        what = f"no config.json; there is one in {quoted(inner[0], 40)}: give that folder if it is the checkpoint"
    if what is None and any(name.endswith(".safetensors") for name in found):
        what = "no config.json beside the weights; get the model's own from where the weights are from"
    if what is None:
        raise DgemmaError(f"{shown(folder / 'config.json')}: no such file; {WANTED}")
    raise DgemmaError(f"{shown(folder)}: {what}")


def no_weights(folder: Path, single: str, index: str) -> DgemmaError:
    """Return the error for a folder that has a config.json and no weights that can be read."""
    found = sorted(os.listdir(folder))
    shards = [name for name in found if name.endswith(".safetensors")]
    if (what := _named(folder, found)) is not None:
        pass
    elif shards and (match := _SHARD.fullmatch(shards[0])):
        count, total = len(shards), int(match[2])
        what = f"{count} .safetensors file{'s' if count > 1 else ''} of {total} but no {index}; download the rest"
    elif shards:
        many = len(shards) > 1
        what = f"{len(shards)} .safetensors file{'s' if many else ''} but no {index}; " + (
            "download it" if many else f"if it holds the whole model, name it {single}"
        )
    else:
        what = f"neither {single} nor {index} in it; download the weights"
    return DgemmaError(f"{shown(folder)}: {what}")


def hint(unknown: Iterable[str]) -> str:
    """Return what unknown tensors say of a folder, to be put behind their names; or nothing."""
    for name in unknown:
        for mark, what in _MARKS.items():
            if re.search(mark, name, re.ASCII):
                return f": {what}"
    return ""


def _named(folder: Path, found: list[str]) -> str | None:
    """What a folder without weights of ours is, by the names in it."""
    if "adapter_config.json" in found or any(name.startswith("adapter_model.") for name in found):
        return (
            "a LoRA (PEFT) adapter, which holds changes of a model and no model; merge it into its model "
            "(merge_and_unload) and save that"
        )
    ends = {end: [name for name in found if name.lower().endswith(end)] for end in (".safetensors", ".gguf", ".onnx")}
    if unfinished := [name for name in found if name.endswith((".incomplete", ".part", ".crdownload", ".aria2"))]:
        return f"a download that did not finish ({quoted(unfinished[0], 40)}); download the model again"
    downloads = folder / ".cache" / "huggingface" / "download"
    if not ends[".safetensors"] and any(downloads.glob("*.incomplete")):
        return "a download that did not finish; run the same `hf download` again"
    if ends[".safetensors"]:
        return None
    if ends[".gguf"]:
        return f"GGUF, {_GGUF}"
    if ends[".onnx"]:
        return "ONNX graphs without the checkpoint's weights; give the folder that they were exported from"
    if pickles := [name for name in found if name.endswith(_PICKLES)]:
        return (
            f"its weights are pickle files ({quoted(pickles[0], 40)}), which are never opened because they can run "
            "code; get or save them as safetensors"
        )
    return None
