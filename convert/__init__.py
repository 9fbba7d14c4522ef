"""The converter: any published layout in, one layout out, streaming.

layouts, stored   what a source folder holds, whoever wrote it; integers: W4A16 and fp8 in blocks;
                  declared: what only config.json tells of them
gguf_*            the same of a GGUF file: names and tensors, settings, blocks, the tokenizer
recipes, plan     which tensor becomes what, and in which file it lands
job, encode       the work, tensor by tensor
crew, partial     worker processes, and the unfinished folder that a later run resumes
target            where the finished folder is to be
converter, verify the run itself, and its check
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .converter import Report
    from .meter import Progress


def convert(
    source: str | Path,
    out: str | Path,
    recipe: str | None = None,
    *,
    rules: str | Path | None = None,
    mlx: bool = False,
    requantize: bool = False,
    force: bool = False,
    verify: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Convert a checkpoint folder.

    Interrupted at any point, the same call goes on where it was. If `out` is there and was made by the same call from
    the same source, nothing is done.

    Args:
        source: a folder, a GGUF file, or a Hugging Face hub id, which is downloaded. bf16, f16 or f32, MLX's quantized
            layout, modelopt's NVFP4, compressed-tensors' NVFP4, FP8 and integers, or fp8 in blocks.
        out: the folder to make. Until it is whole it is called `<out>.partial`.
        recipe: a name in `convert.recipes.RECIPES`; by default `4bit`, and `keep` where the source is
            quantized already.
        rules: a file of one's own rules, in place of a recipe.
        mlx: store what MLX's own loaders ask for, so that the folder loads in mlx-vlm: biases of symmetric formats, and
            no global scales.
        requantize: allow weights that are quantized already to be rounded again.
        force: make `out` anew if it is there, and throw away work begun with other settings.
        verify: read everything back and compare it with the source.
        revision: branch, tag or commit, for a hub id.
        tokenizer: a folder with the original tokenizer, for a GGUF file.
        workers: processes that encode; by default one for each core, and none besides this for what is small.
        progress: called a few times a second.

    Raises:
        DgemmaError: anything wrong with the source, the target or the recipe, in one line.
    """
    from . import converter

    return converter.convert(
        source, out, recipe, rules=rules, mlx=mlx, requantize=requantize, force=force, verify=verify,
        revision=revision, tokenizer=tokenizer, workers=workers, progress=progress,
    )  # fmt: skip
