"""What a constraint costs a pass of 110 M parameters over 256 positions: passes with and without one, in turns.

    python benchmarks/constraints_pass.py --tokenizer FOLDER     # a folder with a tokenizer.json, such as Gemma 3's

Automata over the first 32,768 tokens of that folder, as many as the model has, or with `--whole` over 262,144: a date,
a JSON object of four fields, a text of at most 200 characters, and objects of six strings of at most 30 and seven of at
most 70. The model is random and its distributions are flat. `choice` is the part that runs on the host, on the masses
of the pass before; `added` is what a whole pass takes longer, class sums in the vocabulary head included. Ratios are
medians of ratios of neighbours.
Rows go to results/constraints_pass.jsonl, the last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import rows
import tokenizers
from class_head import passes_of

from dgemma.constraints.automaton import TokenAutomaton
from dgemma.constraints.compiled import compile_constraint
from dgemma.constraints.walk import Constraint
from dgemma.core.canvas import Chosen
from dgemma.core.config import SamplerConfig
from dgemma.core.parts import Masses
from dgemma.core.passes import Passes
from dgemma.core.sampler import draws_of, first_canvas
from dgemma.text.tokens import Tokenizer

LENGTH, PROMPT, BUDGET = 256, 128, 2048
STRING = '"[^"\\\\\\x00-\\x1f]{0,%d}"'


def record(**fields: str) -> str:
    return r"\{" + ", ".join(f'"{name}": {pattern}' for name, pattern in fields.items()) + r"\}"


SIX = ("name", "street", "city", "country", "phone", "mail")
PATTERNS = {
    "date": r"\d{4}-\d\d-\d\d",
    "object of 4": record(name=STRING % 20, age="(0|[1-9][0-9]{0,2})", mail=STRING % 30, member="(true|false)"),
    "text of 200": r'[^"\\\x00-\x1f]{0,200}',
    "6 strings of 30": record(**dict.fromkeys(SIX, STRING % 30)),
    "7 strings of 70": record(**dict.fromkeys((*SIX, "note"), STRING % 70)),
}


def cut(automaton: TokenAutomaton, vocab: int) -> TokenAutomaton:
    """Return the automaton over the first tokens alone; every byte is among them, so that all states stay."""
    classes = automaton.classes[:vocab]
    left = np.unique(classes[classes >= 0])
    number = np.full(automaton.count + 1, -1, np.int32)
    number[left] = np.arange(len(left))
    kept = number[automaton.labels] >= 0
    return TokenAutomaton(
        classes=number[classes], count=len(left), sources=automaton.sources[kept],
        labels=number[automaton.labels[kept]], targets=automaton.targets[kept], states=automaton.states,
        start=automaton.start, accepting=automaton.accepting,
    )  # fmt: skip


def runs_of(passes: Passes, constraint: Constraint) -> dict[str, Callable[[], Any]]:
    """Return what is timed: a pass, one within the constraint, and the choice alone on the masses that it had."""
    vocab = passes.config.vocab_size
    generator = np.random.default_rng(0)
    slot = passes.open(PROMPT, LENGTH)
    passes.read([(slot, generator.integers(6, vocab, PROMPT).astype(np.int32))])
    starts = {slot: first_canvas(0, 0, LENGTH, vocab)}
    draws = draws_of(SamplerConfig(), seed=0, canvas=0, step=0, length=LENGTH, vocab_size=vocab)
    walk = constraint.begin(budget=BUDGET, canvas_length=LENGTH, held=np.zeros(0, np.int32))
    seen: list[Masses] = []

    def choose(masses: Masses) -> Chosen:
        seen[:] = [Masses(*(one[0] for one in masses))]
        return Chosen(*(one if one is None else one[None] for one in alone()))

    given: dict[str, Any] = {"uniforms": draws.uniforms[0], "held": draws.held[0], "greedy": False}
    bound = float(draws.entropy_bound[0, 0])

    def alone() -> Chosen:
        return walk.choose(seen[0], bound=bound, **given)

    return {
        "pass": lambda: passes.step([slot], draws, starts)(),
        "within": lambda: passes.step_within([slot], draws, starts, constraint.classes, choose),
        "choice": alone,
    }


def measure(
    passes: Passes, constraint: Constraint, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:  # fmt: skip
    """Time all in turn; return medians in milliseconds, and their ratios to the pass."""
    runs = runs_of(passes, constraint)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            began = clock()
            run()
            if i > 1:  # the first two warm up
                times[name].append(clock() - began)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    added = statistics.median(b / a - 1 for a, b in zip(times["pass"], times["within"], strict=True))
    ratio = statistics.median(b / a for a, b in zip(times["pass"], times["choice"], strict=True))
    return {f"{name}_ms": round(1e3 * taken, 1) for name, taken in middle.items()} | {
        "choice_of_pass": round(ratio, 3), "added_to_pass": round(added, 3),
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--tokenizer", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(PATTERNS)), help="[default: all]")
@click.option("--whole", is_flag=True, help="The tokenizer's whole vocabulary, and a model of it.")
@click.option("--repeats", default=11, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Of the pass; a choice takes one.")
@click.option("--cpu", is_flag=True, help="Count CPU time, which with one thread a busy machine changes least.")
@click.option("--dry", is_flag=True, help="Write no rows.")
def main(
    folder: Path, only: tuple[str, ...], whole: bool, repeats: int, threads: int, cpu: bool, dry: bool
) -> None:  # fmt: skip
    import torch

    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    tokenizer = Tokenizer(folder, vocab_size=size)
    passes = passes_of("torch", 262_144 if whole else 32_768, "float32")
    with passes.home():
        for name in only or PATTERNS:
            began = time.perf_counter()
            compiled = compile_constraint(PATTERNS[name], tokenizer, ends=[1])
            built = time.perf_counter() - began
            automaton = cut(compiled, passes.config.vocab_size)
            constraint = Constraint(automaton=automaton)
            lattice = constraint.lattice
            row = {
                "pattern": name, "vocab": passes.config.vocab_size, "states": automaton.states,
                "classes": automaton.count,
                "edges": len(automaton.sources), "pairs": len(lattice.set_order), "sets": len(lattice.set_starts),
                "built_s": round(built, 2),
            } | measure(passes, constraint, repeats, time.process_time if cpu else time.perf_counter)  # fmt: skip
            print(json.dumps(row), file=sys.stderr)
            found.append(
                row
                if dry
                else rows.append("constraints_pass", row | {"threads": threads, "cpu_time": cpu}, "numpy", "torch")
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
