"""Held tokens in ONNX graphs: what a graph does with them, shown to be looked at, and whole generations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Commit, DiffusionGemma, Done, Draft
from dgemma.core import sampler
from dgemma.core.canvas import FREE
from dgemma.core.row import Request
from dgemma.export import graphs
from dgemma.tools.verify_onnx import verify
from tiny import tiny_checkpoint

CANVAS, VOCAB = 16, 200


def unheld(*given: Any) -> Any:
    """What a graph does that has the input and does not look at it."""
    ops, held, *rest = given
    return sampler.held_in(ops, held * 0 - 1, *rest)


def counts(ops: Any, held: Any, bound: Any, noise: Any, taken: Any, argmax: Any, entropy: Any) -> Any:
    """vLLM's rule (0.33): what is held takes its share of the bound."""
    accepted = sampler.accept(ops, entropy, bound)
    free = held < 0
    canvas = ops.where(free, ops.where(accepted, taken, noise), held)
    return ops.where(free, argmax, held), ops.where(free, entropy, 0.0), accepted, canvas


def lost_at_commit(ops: Any, held: Any, bound: Any, noise: Any, taken: Any, argmax: Any, entropy: Any) -> Any:
    """vLLM's rule (0.33): the input is pinned, and the argmax is committed."""
    _, *rest = sampler.held_in(ops, held, bound, noise, taken, argmax, entropy)
    return argmax, *rest


def renoised(ops: Any, held: Any, bound: Any, noise: Any, taken: Any, argmax: Any, entropy: Any) -> Any:
    argmax, entropy, accepted, _ = sampler.held_in(ops, held, bound, noise, taken, argmax, entropy)
    return argmax, entropy, accepted, ops.where(accepted, taken, noise)


def unsure(ops: Any, held: Any, bound: Any, noise: Any, taken: Any, argmax: Any, entropy: Any) -> Any:
    kept, _, *rest = sampler.held_in(ops, held, bound, noise, taken, argmax, entropy)
    return kept, entropy, *rest


MUTATIONS = {
    unheld: {"argmax", "entropy", "accepted", "next_canvas"}, counts: {"accepted"},
    lost_at_commit: {"argmax"}, renoised: {"next_canvas"}, unsure: {"entropy"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("held"), hidden_size=64, intermediate_size=64, moe_intermediate_size=64
    )


@pytest.mark.parametrize("wrong", [None, *MUTATIONS])
def test_verifying_looks_at_what_is_held(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any] | None
) -> None:
    if wrong is not None:
        monkeypatch.setattr(graphs, "sampler", SimpleNamespace(held_in=wrong))
    dgemma.export(folder, tmp_path / "out", standalone=True)
    errors = verify(tmp_path / "out", folder)
    exact = {name: errors[name] for name in ("token", "argmax", "accepted", "next_canvas")}
    exact["entropy"] = errors["entropy"] if errors["entropy"] > 1e-2 else 0.0
    # Another canvas leads to another pass behind it, of which more differs.
    assert {name for name, error in exact.items() if error} >= MUTATIONS.get(wrong, set())
    assert wrong is not None or not any(exact.values()), exact


def generated(
    model: DiffusionGemma, given: Sequence[tuple[list[int], dict[str, Any]]]
) -> list[tuple[list[int], list[Draft], Any]]:
    """Run requests at once → each one's tokens, drafts and statistics."""
    handles = []
    for prompt, options in given:
        settings = sampler.settings(model.generation.sampler, **options.get("sampler", {}))
        handles.append(
            model.engine.add(
                Request(
                    prompt=tuple(prompt), max_new_tokens=options.get("budget", 3 * CANVAS), seed=options["seed"],
                    sampler=settings, eos_token_ids=(), held=tuple(options.get("held", ())),
                    constraint=options.get("constraint"), canvas_length=options.get("length"),
                    fit=options.get("fit", False),
                )
            )
        )  # fmt: skip
    found = []
    for handle in handles:
        events = list(handle.events())
        (done,) = [event for event in events if isinstance(event, Done)]
        tokens = [token for event in events if isinstance(event, Commit) for token in event.tokens]
        found.append((tokens, [event for event in events if isinstance(event, Draft)], done.stats))
    return found


def requests(seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Rows of one prompt and of others; without holds, with some, with a canvas that is all held."""
    draw = np.random.default_rng(seed)
    same = draw.integers(16, VOCAB, 30).tolist()
    given = []
    for number, share in enumerate((0.0, 0.2, 0.5, 0.9, 0.3, 0.3)):
        prompt = same if number < 4 else draw.integers(16, VOCAB, int(draw.integers(1, 60))).tolist()
        held = np.where(draw.random(3 * CANVAS) < share, draw.integers(16, VOCAB, 3 * CANVAS), FREE)
        if number == 2:
            held[CANVAS : 2 * CANVAS] = draw.integers(16, VOCAB, CANVAS)  # which takes no pass
        settings = dict(greedy=number == 3, stability=0 if number == 4 else 1, confidence=float(draw.uniform(0, 3)))
        settings |= dict(entropy_bound=float(draw.uniform(0, 6)), t_min=4.0, t_max=6.0, steps=5)  # hot: many changes
        given.append((prompt, dict(seed=number, held=held.tolist(), sampler=settings)))
    return given


@pytest.mark.parametrize("recipe", ["float", "4bit", "8bit"])
def test_generations_with_held_tokens_are_those_of_torch(folder: Path, tmp_path: Path, recipe: str) -> None:
    if recipe != "float":
        dgemma.convert(folder, tmp_path / "out", recipe=recipe, workers=1)
        folder = tmp_path / "out"
    want, got = (dgemma.load(folder, backend=name, dtype="float32") for name in ("torch", "onnx"))
    for seed in range(3 if recipe == "float" else 1):
        given = requests(seed)
        for one, two, (_, options) in zip(generated(want, given), generated(got, given), given, strict=True):
            held = np.asarray(options["held"])
            assert two[0] == one[0] and two[2].steps == one[2].steps
            np.testing.assert_array_equal(np.asarray(two[0])[held != FREE], held[held != FREE])
            for draft, other in zip(two[1], one[1], strict=True):
                np.testing.assert_array_equal(draft.accepted, other.accepted)
                np.testing.assert_array_equal(draft.following, other.following)
                if draft.held is not None:
                    assert not draft.entropy[draft.held].any() and draft.accepted[draft.held].all()


def test_the_stop_test_leaves_held_positions_out(folder: Path) -> None:
    """With half of a canvas held, the mean over all of it would be half as high."""
    model = dgemma.load(folder, backend="onnx", dtype="float32")
    held = [20, FREE] * (CANVAS // 2)
    settings = dict(t_min=4.0, t_max=6.0, steps=2, stability=0)
    ((_, (first, *_), _),) = generated(model, [([30], dict(seed=0, budget=CANVAS, held=held, sampler=settings))])
    mean = float(first.entropy[first.held == 0].mean())
    for confidence, steps in ((0.9 * mean, 2), (1.1 * mean, 1)):
        options = dict(seed=0, budget=CANVAS, held=held, sampler=settings | dict(confidence=confidence))
        ((_, drafts, _),) = generated(model, [([30], options)])
        assert len(drafts) == steps


def test_no_held_token_is_ever_lost(folder: Path) -> None:
    """Random cases, mixed in batches: canvas lengths, budgets, early stops. DGEMMA_HELD_CASES sets how many."""
    model = dgemma.load(folder, backend="onnx", dtype="float32")
    cases = int(os.environ.get("DGEMMA_HELD_CASES", "48"))
    draw = np.random.default_rng(11)
    for first in range(0, cases, 8):
        given = []
        for seed in range(first, first + 8):
            budget = int(draw.integers(1, 50))
            held = np.where(draw.random(budget) < draw.random(), draw.integers(0, VOCAB, budget), FREE)
            settings = dict(
                t_min=0.4, t_max=float(draw.uniform(0.4, 6)), steps=int(draw.integers(1, 6)),
                entropy_bound=float(draw.choice([0, 0.1, 2, 9])), confidence=float(draw.choice([0, 0.5, 9])),
                stability=int(draw.integers(0, 3)), greedy=bool(draw.integers(2)),
            )  # fmt: skip
            options = dict(seed=seed, budget=budget, held=held.tolist(), sampler=settings)
            options |= dict(length=int(draw.choice([4, 8, 16])), fit=bool(draw.integers(2)))
            given.append((draw.integers(16, VOCAB, int(draw.integers(1, 30))).tolist(), options))
        for (tokens, drafts, _), (_, options) in zip(generated(model, given), given, strict=True):
            held = np.asarray(options["held"])
            np.testing.assert_array_equal(np.asarray(tokens)[held != FREE], held[held != FREE])
            for draft in drafts:
                mine = np.full(len(draft.tokens), FREE)
                part = held[draft.canvas * options["length"] :][: len(mine)]
                mine[: len(part)] = part
                for shown in (draft.tokens, draft.following):
                    np.testing.assert_array_equal(shown[mine != FREE], mine[mine != FREE])
                marked = np.zeros(len(mine), bool) if draft.held is None else draft.held
                np.testing.assert_array_equal(mine != FREE, marked)
