"""The engine and the public API: budgets, ends, events, statistics, and the same tokens everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dgemma
from dgemma import Commit, DgemmaError, DiffusionGemma, Done, Draft, Prefill
from dgemma.core.engine import Engine
from dgemma.core.random import step_noise
from fake_passes import FakePasses
from said import says
from tiny import IDS, VOCAB, tiny_checkpoint
from under_test import BACKENDS

CANVAS = 16
LOADABLE = tuple(name for name in BACKENDS if name in ("numpy", "torch", "mlx"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine"), max_position_embeddings=100)


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return dgemma.load(folder, backend="torch")


@pytest.fixture
def script(model: DiffusionGemma) -> Callable[..., DiffusionGemma]:
    """Return a model that "denoises" given text: what the engine does with a canvas, without what is on it."""

    def use(*canvases: str | list[int]) -> DiffusionGemma:
        rows = []
        for canvas in canvases:
            ids = model.tokenizer.encode(canvas) if isinstance(canvas, str) else canvas
            rows.append(np.asarray(ids + [IDS["<pad>"]] * (CANVAS - len(ids)), np.int32))
        passes = FakePasses(model.config, script=rows)
        return DiffusionGemma(Engine(passes, model.tokenizer), model.generation, model.path)

    return use


def log(model: DiffusionGemma) -> list[str]:
    """What was done since the last time it was asked for, but for the prompt's reading."""
    passes = model.engine.passes
    assert isinstance(passes, FakePasses) and not passes.held
    said, steps = [], 0
    for what, value in passes.log[:]:
        steps = steps + 1 if what == "step" else 0
        if what == "read":
            said.append(f"read {value[0]}")
        elif what == "step" and steps == 1:
            said.append("denoise")
    passes.log.clear()
    return said[1:]


# ---- Budgets and ends -------------------------------------------------------------------------------------------


def test_max_new_tokens_is_exact_and_the_last_canvas_is_never_encoded(script: Any) -> None:
    model = script("abcdefghijklmnop", "qrstuvwxyzABCDEF", "never")
    result = model.generate("x", max_new_tokens=10)
    assert (result.text, len(result.token_ids), result.finish_reason) == ("abcdefghij", 10, "length")
    assert log(model) == ["denoise"]
    result = model.generate("x", max_new_tokens=17)
    assert (result.text, result.finish_reason) == ("abcdefghijklmnopq", "length")
    assert log(model) == ["denoise", f"read {CANVAS}", "denoise"]
    assert (result.stats.encode_passes, result.stats.canvases, result.stats.steps) == (2, 2, 6)
    assert model.generate("x", max_new_tokens=16).text == "abcdefghijklmnop"
    assert log(model) == ["denoise"]


@pytest.mark.parametrize(
    ("generation", "emitted"),
    [
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": 7, "max_length": 3}, 7),  # as in transformers
        ({"max_new_tokens": None, "max_length": 13}, 10),  # three are the prompt's
        ({"max_new_tokens": None}, 256),
    ],
)
def test_the_budget_is_the_checkpoints(generation: dict[str, Any], emitted: int, tmp_path: Path) -> None:
    model = dgemma.load(tiny_checkpoint(tmp_path, generation=generation), backend="torch")
    assert len(model.generate([40, 41, 42], steps=1, eos=()).token_ids) == emitted
    assert len(model.generate([40, 41, 42], 5, steps=1, eos=()).token_ids) == 5


def test_a_max_length_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    generation = {"max_new_tokens": None, "max_length": 20}
    model = dgemma.load(tiny_checkpoint(tmp_path, generation=generation), backend="torch")
    with says("20 tokens", "max_length", "is 20", "give max_new_tokens"):
        model.stream([40] * 20)
    assert len(model.generate([40] * 20, 3, steps=1, eos=()).token_ids) == 3


def test_ends_are_config_jsons_where_the_generation_config_names_none(tmp_path: Path) -> None:
    model = dgemma.load(tiny_checkpoint(tmp_path, generation={"eos_token_id": None}), backend="torch")
    assert model._ends(None) == (IDS["<eos>"], IDS["<turn|>"])


def test_a_cache_beyond_this_machine_is_refused_by_arithmetic(tmp_path: Path) -> None:
    """A context as long as it may be: 2^31 tokens, and nothing is allocated."""
    model = dgemma.load(tiny_checkpoint(tmp_path, max_position_embeddings=1 << 31), backend="torch")
    line = says("a cache of 2,1", "tokens takes", "GB and this machine has", "smaller max_new_tokens")
    with line:
        model.generate([5, 6, 7], 1 << 31)
    assert len(model.generate([5, 6, 7], 5, steps=1, eos=()).token_ids) == 5


def test_end_of_sequence_cuts_and_nothing_follows(script: Any) -> None:
    model = script("abcdefghijklmnop", "qr<turn|>never", "never")
    result = model.generate("x", max_new_tokens=1000)
    assert (result.text, result.finish_reason, result.stats.emitted_tokens) == ("abcdefghijklmnopqr", "stop", 18)
    assert log(model) == ["denoise", f"read {CANVAS}", "denoise"]


def test_an_end_beyond_the_budget_is_not_the_reason(script: Any) -> None:
    model = script("abcdef<turn|>")
    assert model.generate("x", max_new_tokens=5).finish_reason == "length"
    assert model.generate("x", max_new_tokens=6).finish_reason == "stop"  # the answer is whole


def test_eos_can_be_overridden(script: Any) -> None:
    model = script("ab<turn|>cd<eos>ef")
    z = model.tokenizer.encode("d")
    assert model.generate("x", max_new_tokens=8, eos=z).text == "abc"
    assert model.generate("x", max_new_tokens=8, eos=[]).token_ids == tuple(
        model.tokenizer.encode("ab<turn|>cd<eos>ef")
    )
    assert model.generate("x", max_new_tokens=8, eos=IDS["<eos>"]).text == "abcd"


def test_stop_strings_cut_across_canvases(script: Any) -> None:
    model = script("abcdefghijklmnST", "OPxyz")
    result = model.generate("x", max_new_tokens=30, stop="STOP")
    assert (result.text, result.finish_reason) == ("abcdefghijklmn", "stop")
    assert model.tokenizer.decode(result.token_ids) == result.text


def test_thinking_comes_back_apart(script: Any) -> None:
    model = script("<|channel>thought\nhmmmmmmm"[:24], "mm<channel|>yes<turn|>")
    result = model.generate("x", max_new_tokens=30)
    assert (result.text, set(result.thinking)) == ("yes", {"h", "m"})


def test_the_context_limit_ends_the_text(script: Any) -> None:
    model = script(*["abcdefghijklmnop"] * 3)
    result = model.generate([5] * 70, max_new_tokens=1000)
    assert (len(result.token_ids), result.finish_reason) == (30, "length")
    with pytest.raises(DgemmaError, match="100 tokens and the model's context is 100"):
        model.generate([5] * 100)


# ---- The real loop ----------------------------------------------------------------------------------------------


def test_events_come_in_order_and_agree_with_generate(model: DiffusionGemma) -> None:
    events = list(model.stream("hello", max_new_tokens=40, seed=3, eos=[], steps=4))
    assert isinstance(events[0], Prefill) and events[0].done == 0
    assert isinstance(events[-1], Done)
    commits = [event for event in events if isinstance(event, Commit)]
    drafts = [event for event in events if isinstance(event, Draft)]
    assert [commit.canvas for commit in commits] == [0, 1, 2]
    assert [len(commit.tokens) for commit in commits] == [16, 16, 8]
    for commit in commits:  # what is committed is the last draft, which is the argmax canvas
        last = [draft for draft in drafts if draft.canvas == commit.canvas][-1]
        assert tuple(last.tokens[: len(commit.tokens)]) == commit.tokens
    result = model.generate("hello", max_new_tokens=40, seed=3, eos=[], steps=4)
    assert result.token_ids == tuple(token for commit in commits for token in commit.tokens)
    stats = result.stats
    assert stats.steps == len(drafts) and stats.canvases == 3 and stats.emitted_tokens == 40
    first = events[-1].stats
    assert (first.encode_passes, first.cached_tokens) == (3, 0)  # the prompt and two canvases
    assert (stats.encode_passes, stats.cached_tokens) == (2, stats.prompt_tokens)  # and a prompt that was kept
    assert stats.tokens_per_forward == 40 / len(drafts)
    assert 0 < first.prefill_seconds <= (first.first_draft_seconds or 0) <= (first.first_text_seconds or 0)
    assert stats.peak_memory_bytes > 1 << 20


def test_the_step_cap_leaves_the_schedule_alone(model: DiffusionGemma) -> None:
    def drafts(**options: Any) -> list[np.ndarray]:
        events = model.stream([7, 8], max_new_tokens=1, confidence=0.0, **options)
        return [event.entropy for event in events if isinstance(event, Draft)]

    whole, capped, shorter = drafts(), drafts(steps=3), drafts(steps=3, schedule_steps=3)
    assert (len(whole), len(capped), len(shorter)) == (6, 3, 3)
    np.testing.assert_array_equal(whole[2], capped[2])
    assert not np.array_equal(capped[2], shorter[2])


def test_the_same_seed_gives_the_same_tokens(model: DiffusionGemma) -> None:
    runs = [model.generate("hi", max_new_tokens=32, seed=seed, eos=[]).token_ids for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("backend", LOADABLE)
def test_every_backend_gives_the_same_tokens(folder: Path, model: DiffusionGemma, backend: str) -> None:
    """Three passes a canvas: through self-conditioning a random model is chaotic, and float32 rounding grows tenfold a
    pass, from 1e-6 to whole nats in six. A trained model is not (`test_nano.py` runs to the end)."""
    other = dgemma.load(folder, backend=backend)
    assert (other.backend, other.dtype) == (backend, "float32")
    for seed, prompt in enumerate(["hello", [9] * 31, "a longer prompt that is beyond the sliding window"]):
        options: dict[str, Any] = dict(max_new_tokens=40, seed=seed, eos=[], steps=3)
        assert other.generate(prompt, **options).token_ids == model.generate(prompt, **options).token_ids


def test_a_closed_stream_leaves_the_model_usable(model: DiffusionGemma) -> None:
    want = model.generate("hi", max_new_tokens=20, eos=[]).token_ids
    stream = model.stream("something else", max_new_tokens=40)
    for event in stream:
        if isinstance(event, Draft):
            break
    stream.close()  # type: ignore[attr-defined]
    assert model.generate("hi", max_new_tokens=20, eos=[]).token_ids == want


def test_a_slow_reader_does_not_slow_the_figures(model: DiffusionGemma) -> None:
    """The engine goes on while its reader has an event, and its clock ends with its work."""
    began = time.perf_counter()
    stream = model.stream("ab", max_new_tokens=CANVAS)
    next(stream)
    while model.engine.busy:
        time.sleep(0.001)
    over = time.perf_counter()
    time.sleep(0.1)
    done = list(stream)[-1]
    assert isinstance(done, Done) and done.stats.seconds <= over - began


def test_eos_does_not_grow_with_use(model: DiffusionGemma) -> None:
    before = (model.generation, model.config.eos_token_ids)
    for _ in range(3):
        model.generate("hi", max_new_tokens=1, eos=[3], stop=["a"])
    assert (model.generation, model.config.eos_token_ids) == before


def test_logits_take_text_or_ids(model: DiffusionGemma) -> None:
    prompt = model.tokenizer.render([{"role": "user", "content": "hi"}])
    canvas = model.tokenizer.encode("0123456789abcdef")
    first = model.logits(prompt, canvas)
    assert (first.shape, first.dtype) == ((CANVAS, VOCAB), np.float32)
    np.testing.assert_array_equal(first, model.logits("hi", "0123456789abcdef"))
    second = model.logits(prompt, canvas, first / 0.7)
    assert not np.allclose(first, second)


# ---- Bad input --------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty ids": ([], {}, "prompt is empty"),
    "id too high": ([VOCAB], {}, f"token id {VOCAB}"),
    "negative id": ([-1], {}, "token id -1"),
    "an image": ([IDS["<|image|>"]], {}, "text only"),
    "nested ids": ([[1, 2], [3, 4]], {}, "flat sequence"),
    "ragged ids": ([[1], [2, 3]], {}, "flat sequence"),
    "floats": ([1.5], {}, "flat sequence"),
    "a number": (7, {}, "flat sequence"),
    "bytes": (b"hi", {}, "flat sequence"),
    "None": (None, {}, "flat sequence"),
    "no tokens": ("x", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    "half a token": ("x", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    "seed": ("x", {"seed": -1}, "seed is -1"),
    "steps": ("x", {"steps": 0}, "steps is 0"),
    "temperatures": ("x", {"t_min": 2.0, "t_max": 1.0}, "below t_min"),
    "bound": ("x", {"entropy_bound": float("nan")}, "entropy_bound is NaN"),
    "stop": ("x", {"stop": [""]}, "non-empty"),
    "eos": ("x", {"eos": [VOCAB]}, "eos holds token id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_in_one_line_before_any_event(model: DiffusionGemma, case: str) -> None:
    prompt, options, expected = BAD[case]
    with pytest.raises(DgemmaError, match=expected) as raised:
        model.stream(prompt, **options)
    assert "\n" not in str(raised.value)


@given(prompt=st.one_of(st.text(max_size=20), st.lists(st.integers(-2, VOCAB + 1), max_size=8), st.binary(max_size=4)))
def test_any_prompt_generates_or_is_refused(model: DiffusionGemma, prompt: Any) -> None:
    try:
        result = model.generate(prompt, max_new_tokens=3, steps=1)
    except DgemmaError as error:
        assert "\n" not in str(error)
    else:
        assert len(result.token_ids) <= 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"backend": "tensorflow"}, "choose from auto, mlx, torch, onnx, numpy"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cuda"}, "no CUDA card"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"backend": "numpy", "device": "gpu"}, "cpu only"),
    ],
)
def test_bad_load_options_are_refused(folder: Path, options: dict[str, str], expected: str) -> None:
    with pytest.raises(DgemmaError, match=expected) as raised:
        dgemma.load(folder, **({"backend": "torch"} | options))
    assert "\n" not in str(raised.value)


def test_loading_tells_its_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    dgemma.load(folder, backend="numpy", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)


# ---- Random numbers ---------------------------------------------------------------------------------------------


def test_step_noise_is_pinned() -> None:
    """Goldens everywhere depend on these numbers; NumPy promises that Philox's bits never change."""
    uniforms, tokens = step_noise(seed=2**63 + 5, canvas=2, step=7, length=4, vocab_size=262_144)
    assert uniforms.dtype == np.float32 and tokens.dtype == np.int32
    np.testing.assert_array_equal(uniforms, np.float32([0.91499776, 0.27536815, 0.31800693, 0.48423177]))
    np.testing.assert_array_equal(tokens, [67175, 1730, 125680, 203862])
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [step_noise(seed=a, canvas=b, step=c, length=8, vocab_size=99)[0].tobytes() for a, b, c in keys]
    assert len(set(draws)) == 4
