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

from .converter import Progress, Report, convert

__all__ = ["Progress", "Report", "convert"]
