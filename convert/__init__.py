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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converter import Report


def convert(*args: Any, **options: Any) -> Report:
    """Convert a checkpoint; see `converter.convert`."""
    from .converter import convert as run

    return run(*args, **options)
