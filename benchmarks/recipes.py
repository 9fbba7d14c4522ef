"""Every recipe on nano, held against the checkpoint as it is shipped: `dgemma compare` on held-out Sudoku boards.

    python benchmarks/recipes.py --boards 200 800

Converts nano with every built-in recipe and with a few rules that show what a part of the model is worth, compares each
with the original, appends a JSON row for each to results/recipes.jsonl, and prints the table that docs/weights.md has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rows

from dgemma.convert import convert, recipes
from dgemma.tools.agreement import Change
from dgemma.tools.compare import Comparison, measure, read_prompts, record

HERE = Path(__file__).resolve().parent

_FOUR = {
    "*.embed_tokens": "symmetric8-g32", "*.experts.*_proj": "symmetric4-g32", "*.router.proj": "stored",
    "*_proj": "symmetric8-g32",
}  # fmt: skip
RULES: dict[str, dict[str, str]] = {
    "4bit, embedding 4-bit": _FOUR | {"*.embed_tokens": "symmetric4-g32"},
    "4bit, attention 4-bit": {"*.self_attn.*_proj": "symmetric4-g32"} | _FOUR,
    "4bit, self-conditioning 4-bit": {"*.self_conditioning.*_proj": "symmetric4-g32"} | _FOUR,
    "4-bit everything": {"*.embed_tokens": "symmetric4-g32", "*_proj": "symmetric4-g32"},
    "4bit, experts 3-bit": _FOUR | {"*.experts.*_proj": "symmetric3-g32"},
    "4bit, experts 2-bit": _FOUR | {"*.experts.*_proj": "symmetric2-g32"},
    "4bit, experts mxfp4": _FOUR | {"*.experts.*_proj": "mxfp4"},
}
"""Recipes by rules: each is `4bit` but for one thing."""


def boards(side: int, count: int) -> str:
    script = str(HERE.parent / "examples" / "sudoku" / "prompts.py")
    asked = [sys.executable, script, "--side", str(side), "--count", str(count)]
    return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout


def make(name: str, folder: Path) -> tuple[Path, dict[str, str]]:
    """Convert nano; returns the folder, and what could not have the format that was asked for."""
    out = folder / str(len(list(folder.iterdir())))
    if name in recipes.RECIPES:
        report = convert("nano", out, name, workers=1)
    else:
        rules = out.with_suffix(".json")
        rules.write_text(json.dumps(RULES[name]))
        report = convert("nano", out, rules=rules, workers=1)
    return out, report.fallbacks


def row(name: str, found: Comparison, fallbacks: dict[str, str], common: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "recipes", **common, "recipe": name, "fallbacks": len(fallbacks)}
    result["bits_per_weight"] = round(found.b.bits_per_weight, 3)
    agreement = found.to_dict()["agreement"]
    result |= {key: value if isinstance(value, int) else float(f"{value:.4g}") for key, value in agreement.items()}
    for tally in (found.total, *found.groups):
        one = {
            "boards": tally.prompts, "same": tally.same,
            "steps": round(tally.steps_b, 3), "steps_change": _rounded(tally.steps_change),
            "solved": tally.solved_b, "only_original": tally.only_a, "only_this": tally.only_b,
            "rate_change": _rounded(tally.rate_change),
        }  # fmt: skip
        result[tally.group or "all"] = one
    return result


def _rounded(one: Change | None) -> list[float]:
    return [] if one is None else [round(one.value, 5), round(one.within or 0.0, 5)]


def table(measured: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| recipe | bits | NMSE | top-1 | KL | entropy | steps, 4x4 | steps, 6x6 | 4x4 solved | 6x6 solved |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for one in measured:
        cells = [
            one["recipe"], f"{one['bits_per_weight']:.2f}", f"{one['nmse']:.1e}", f"{one['top1']:.2%}",
            f"{one['kl']:.1e}", f"{one['entropy_shift']:+.1e}",
        ]  # fmt: skip
        for side in ("4x4", "6x6"):
            value, within = one[side]["steps_change"]
            cells.append(f"{one[side]['steps']:.2f} ({value:+.2f} ± {within:.2f})")
        for side in ("4x4", "6x6"):
            (value, within), count = one[side]["rate_change"], one[side]["boards"]
            cells.append(f"{one[side]['solved'] / count:.1%} ({100 * value:+.1f} ± {100 * within:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--boards", type=int, nargs=2, default=[200, 800], metavar="N", help="of 4x4, and of 6x6")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="these recipes alone")
    args = parser.parse_args()
    names = args.only or [*recipes.RECIPES, *RULES]
    ways = {"backend": args.backend, "device": "cpu", "dtype": "float32"}
    cases = read_prompts(boards(4, args.boards[0]) + boards(6, args.boards[1]), "boards")
    canvas = 48
    measured = []

    def progress(what: str, done: int, total: int) -> None:
        if "loading" not in what and done % 100 == 0:
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    with (
        tempfile.TemporaryDirectory() as folder,
        record("nano", cases, max_new_tokens=canvas, seed=args.seed, ways=ways, progress=progress) as recording,
    ):
        for name in names:
            out, fallbacks = make(name, Path(folder))
            one = row(name, measure(recording, out, ways=ways, progress=progress), fallbacks, {"backend": args.backend})
            measured.append(rows.append("recipes", one, args.backend, "numpy"))
    steps = {side: measured[0][side]["steps"] - measured[0][side]["steps_change"][0] for side in ("4x4", "6x6")}
    print(f"original: steps {steps}\n{table(measured)}")


if __name__ == "__main__":
    main()
