"""A whole model through the kernels: held to the NumPy oracle, and the same tokens captured or not.

On the CPU the kernels run in Triton's interpreter. With `-m gpu` the same tests run compiled, on the first card, and
passes are captured by CUDA itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
import loops
from dgemma.backends.cuda import passes as card_module
from dgemma.backends.cuda.graph import Capture, CudaCapture, rerun
from dgemma.backends.cuda.ops import CudaOps
from dgemma.backends.cuda.passes import CardPasses
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.backends.torch.blocks import whole
from dgemma.backends.torch.experts import in_order
from dgemma.backends.torch.inference import InferenceOps
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format, quantize
from dgemma.constraints.walk import Constraint
from dgemma.core import sampler as sampling
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.model import denoise, encode, new_cache
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Cache, Model
from dgemma.tools import bench
from kernel_harness import launched, running
from lattices import automaton_of
from law import assert_low_precision
from tiny import VOCAB, tiny_checkpoint
from under_test import values

CANVAS, SHORT, WINDOW = 8, 4, 12
# Every token goes to every expert: between two that all but tie, low precision may choose either, which is another
# answer and no error. That the right ones are chosen is tested where routing is.
SHAPE: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_experts=3, top_k_experts=3, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, canvas_length=CANVAS,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("cuda"), **SHAPE))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """For several rows in Triton's interpreter."""
    shape: dict[str, Any] = SHAPE | {"canvas_length": SHORT}
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("small"), **shape))


def card_passes(
    ops: CudaOps, model: Model, *, captured: bool, joined: bool = False, reads: tuple[int, ...] = (CANVAS, 12)
) -> CardPasses:
    """Passes captured, by CUDA on a card, or run as they are; rows are filled up to the same sizes either way."""
    device = ops.device
    capture: Capture = rerun if device.type == "cpu" else CudaCapture(device)
    passes = CardPasses(ops, model, capture=capture if captured else None, joined=joined)
    passes.read_sizes, passes.batch_sizes = reads, (1, 2, 4, 8)
    return passes


def build(ops: Any, checkpoint: Checkpoint, recipe: str = "bf16", **kinds: Format) -> Model:
    """The checkpoint's weights in bf16, or in a recipe's formats; `kinds` are formats by a part of the name."""
    formats = bench.formats(checkpoint.config, recipe)

    def get(name: str) -> Any:
        kind = next((kind for part, kind in kinds.items() if part in name), formats[name])
        stored = np.asarray(checkpoint.tensor(name))
        return stored.astype(ml_dtypes.bfloat16) if kind is None else quantize(stored, kind)

    return weights.build(checkpoint.config, lambda name: ops.pack(get(name)), getattr(ops, "stack", lambda part: part))


def states(ops: Ops, model: Model, prompt: int, slots: list[int] | None = None) -> np.ndarray:
    """Two blocks read, then one denoising pass: normed states [B, L, D], of one row or of a row for each slot.

    Of several rows, row b reads b tokens less of each block.
    """
    config = model.config
    batch = len(slots or [0])
    generator = np.random.default_rng(prompt)
    pool = new_cache(
        ops, config, slots=max(slots or [0]) + 1, capacity=prompt + CANVAS, scratch=max(prompt, CANVAS)
    )  # fmt: skip
    index = None if slots is None else ops.asarray(np.array(slots, np.int32))
    cache = Cache(pool.layers, ops.asarray(np.zeros(batch, np.int32)), index)
    for length in (prompt, CANVAS):
        tokens = ops.asarray(generator.integers(0, config.vocab_size, (batch, length), np.int32))
        fresh = None if slots is None else ops.asarray(np.maximum(0, length - np.arange(batch)).astype(np.int32))
        cache = encode(ops, model, cache, tokens, fresh)
    canvas = ops.asarray(generator.integers(0, config.vocab_size, (batch, CANVAS), np.int32))
    soft = ops.asarray(values(prompt, batch, CANVAS, config.hidden_size), ops.dtype)
    return ops.to_numpy(denoise(ops, model, cache, canvas, soft))


@pytest.mark.parametrize("recipe, prompt", [("bf16", 1), ("8bit", WINDOW), ("4bit", WINDOW + 3)])
def test_a_pass_agrees_with_the_oracle(checkpoint: Checkpoint, device: str, recipe: str, prompt: int) -> None:
    rounded, exact = (
        states(oracle, build(oracle, checkpoint, recipe), prompt)
        for oracle in (NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    ops = CudaOps("bfloat16", device)
    with running(device):
        got = states(ops, build(ops, checkpoint, recipe), prompt)
    assert_low_precision(got, rounded, exact)


@pytest.mark.parametrize("prompt", [2, WINDOW + 5])
def test_rows_of_several_lengths_in_any_slots(checkpoint: Checkpoint, device: str, prompt: int) -> None:
    """Below the window and beyond it, with slots of nobody's between."""
    slots = [3, 0, 2]
    rounded, exact = (
        states(oracle, build(oracle, checkpoint, "8bit"), prompt, slots)
        for oracle in (NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    ops = CudaOps("bfloat16", device)
    with running(device):
        got = states(ops, build(ops, checkpoint, "8bit"), prompt, slots)
    for row, slot in enumerate(slots):
        assert_low_precision(got[row], rounded[row], exact[row], f"row {row} in slot {slot}")


def head(ops: Ops, model: Model) -> list[np.ndarray]:
    x = ops.asarray(values(0, 2, 16, model.config.hidden_size), ops.dtype)
    temperature = ops.asarray(np.array([[0.5], [0.8]], np.float32), ops.wide)
    u = ops.asarray(np.random.default_rng(0).random((2, 16), np.float32))
    return [ops.to_numpy(one) for one in ops.vocab_head(x, model.embed_tokens, model.config.softcap, temperature, u)]


@pytest.mark.parametrize("recipe", ["bf16", "8bit"])
def test_the_head_agrees_with_the_oracle(checkpoint: Checkpoint, device: str, recipe: str) -> None:
    rounded, exact = (
        head(oracle, build(oracle, checkpoint, recipe)) for oracle in (NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    ops = CudaOps("bfloat16", device)
    with running(device):
        got = head(ops, build(ops, checkpoint, recipe))
    for i, what in ((2, "entropy"), (3, "soft embedding")):
        assert_low_precision(got[i], rounded[i], exact[i], what)
    same = [(got[i] == exact[i]).mean() for i in (0, 1)]
    assert min(same) > 0.9, f"sampled and argmax tokens of float64: {same}; rounding accounts for a few"


# ---- The loop -----------------------------------------------------------------------------------------------------


QUICK = SamplerConfig(steps=2, schedule_steps=2, confidence=1e9, stability=0)


def written(passes: CardPasses, prompt: int, sampler: SamplerConfig) -> list[Any]:
    """Drafts and text of one request."""
    found = loops.written(Engine(passes, None, prefix_bytes=0), prompt, sampler, max_new_tokens=2 * CANVAS)
    return [row for row in found if row[0] != "length"]


def test_captured_tokens_are_plain_tokens(checkpoint: Checkpoint, device: str) -> None:
    """The prompt is read in two captured chunks, or at once; the canvas stops by itself, one pass late."""
    with running(device):
        ops = CudaOps("bfloat16", device)
        model = build(ops, checkpoint, "4bit")
        plain, captured = (card_passes(ops, model, captured=on) for on in (False, True))
        assert (captured.lookahead, plain.lookahead) == (1, 0)
        want, got = (written(one, 14, QUICK) for one in (plain, captured))
    assert len(want) == 2 + 2 and got == want


def test_captured_rows_are_plain_rows(small: Checkpoint, device: str) -> None:
    """Three requests at once, a row filling the batch up: each canvas's tokens bit for bit those of plain passes."""
    sampler = SamplerConfig(steps=1, schedule_steps=1, confidence=0.0)

    def answers(passes: CardPasses) -> list[Any]:
        engine = Engine(passes, None, prefix_bytes=0)
        handles = [engine.add(loops.request(4 + i, sampler, max_new_tokens=SHORT + 1, seed=i)) for i in range(3)]
        return [loops.seen(handle) for handle in handles]

    with running(device):
        ops = CudaOps("bfloat16", device)
        model = build(ops, small, "4bit")
        plain, captured = (answers(card_passes(ops, model, captured=on, reads=(SHORT, 6))) for on in (False, True))
    assert [one[:-1] for one in captured] == [one[:-1] for one in plain]


def test_captured_rows_with_held_tokens_and_in_a_language(
    small: Checkpoint, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to each other, and as plain passes have them; what is held stays, and what is written is in the language."""
    monkeypatch.setattr(card_module, "LEAST_CLASSES", 4)  # the interpreter takes its time for each
    kind = np.arange(VOCAB) % 3
    table = np.stack([np.choose(kind, (-1, 0, 1)), np.choose(kind, (0, 1, -1))])
    language = Constraint(automaton=automaton_of(table, np.array([True, True])))
    more: list[dict[str, Any]] = [{"held": (-1, 77, -1, 78)}, {"constraint": language, "held": (-1, 22)}, {}]

    def answers(passes: CardPasses) -> list[Any]:
        engine = Engine(passes, None, prefix_bytes=0)
        handles = [
            engine.add(loops.request(4 + i, QUICK, max_new_tokens=SHORT, seed=i, **one)) for i, one in enumerate(more)
        ]
        return [loops.seen(handle)[:-1] for handle in handles]

    with running(device):
        ops = CudaOps("bfloat16", device)
        model = build(ops, small, "4bit")
        plain, captured = (answers(card_passes(ops, model, captured=on, reads=(SHORT, 7))) for on in (False, True))
    assert captured == plain
    (_, held, _), (_, within, _) = (row[-1] for row in captured[:2])
    assert held[1::2] == (77, 78) and within[1] == 22
    state = 0
    for token in within:
        state = int(table[state, token])
        assert state >= 0


def test_a_row_is_the_same_whatever_shares_its_batch(small: Checkpoint, device: str) -> None:
    """Bit by bit, through whole passes: beside other rows, in another place and slot, and filling a batch up."""
    with running(device):
        ops = CudaOps("bfloat16", device)
        model = build(ops, small, "4bit")

        def row(place: int, others: list[int], copies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """A prompt of 5 beside others; `copies` of a batch of 4 are the last row again."""
            passes = card_passes(ops, model, captured=False, reads=(SHORT, 7))
            lengths = [*others[:place], 5, *others[place:]]
            slots = [passes.open(32, SHORT) for _ in lengths]
            seeds = [1 if one == 5 else 10 + at for at, one in enumerate(lengths)]
            passes.read([
                (slot, np.random.default_rng(seed).integers(0, 200, count, np.int32))
                for slot, seed, count in zip(slots, seeds, lengths, strict=True)
            ])  # fmt: skip
            starts = {slot: sampling.first_canvas(seed, 0, SHORT, 200) for slot, seed in zip(slots, seeds, strict=True)}
            draws = sampling.stacked([
                sampling.draws_of(QUICK, seed=seed, canvas=0, step=0, length=SHORT, vocab_size=200) for seed in seeds
            ])  # fmt: skip
            assert len(passes._filled(len(slots))) - len(slots) == copies
            result = passes.step(slots, draws, starts)()
            return result.argmax[place], result.entropy[place], passes.soft(slots[place])

        first, *rest = row(0, [6, 7, 4], 0), row(3, [4, 7, 6], 0), row(2, [7, 6], 1)
    for one in rest:
        for x, y in zip(first, one, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["nano-like", "110m"])
def test_captured_drafts_are_plain_drafts_on_the_card(shape: Any) -> None:
    config = bench.config_of(shape)
    ops = CudaOps("bfloat16", "cuda")
    model = random_model(ops, config, "4bit", bench.random_weight)
    sampler = SamplerConfig(steps=8, schedule_steps=8, confidence=0.0)
    want, got = (
        loops.written(
            Engine(passes, None, prefix_bytes=0), 1024, sampler, max_new_tokens=3 * config.canvas_length
        )
        for passes in (
            card_passes(ops, model, captured=on, reads=(256, 1024)) for on in (False, True)
        )
    )  # fmt: skip
    assert got[:-1] == want[:-1]


@pytest.mark.gpu
def test_nano_writes_on_a_card_what_it_writes_on_the_cpu() -> None:
    """In float32, where nothing is captured; and in bfloat16 it writes at all."""
    made = {"cpu": "float32", "cuda": "float32", "cuda:0": "bfloat16"}
    models = [dgemma.load("nano", backend="torch", device=device, dtype=dtype) for device, dtype in made.items()]
    texts = [model.generate(".3.1 .2.. .... ...4", max_new_tokens=64).text for model in models]
    assert texts[0] == texts[1] and texts[2]


# ---- What runs where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, most", [("4bit", 440), ("8bit", 440), ("bf16", 350)])
def test_a_pass_of_the_26b_is_so_many_launches(recipe: str, most: int) -> None:
    """A launch costs what a small kernel costs: this count is a promise, and what falls back to torch shows in it."""
    ops, config = meta_ops(), bench.config_of("26b")
    model = random_model(ops, config, recipe, meta_weight)
    cache = meta_cache(config, 2048, scratch=256)
    canvas = empty(1, 256, dtype=torch.int32)

    def run() -> None:
        x = denoise(ops, model, cache, canvas, empty(1, 256, config.hidden_size))
        ops.vocab_head(
            x, model.embed_tokens, 30.0, empty(1, 1, dtype=torch.float32), empty(1, 256, dtype=torch.float32)
        )

    assert 0.9 * most < len(launched(run)) <= most


def meta_ops() -> CudaOps:
    """Nothing has contents, and nothing runs."""
    ops = CudaOps("bfloat16", "cpu")
    ops.device = torch.device("meta")
    return ops


def meta_cache(config: ModelConfig, capacity: int, *, scratch: int) -> Cache:
    """A pool of four slots, as a row that has any of them sees it."""
    layers = []
    for one in config.layers:
        entries = scratch + (capacity if one.window is None else min(capacity, one.window - 1))
        layers.append(KV(*(empty(4, one.kv_heads, entries, one.head_dim) for _ in range(2))))
    number = empty(1, dtype=torch.int32)
    return Cache(tuple(layers), number, number)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def random_model(
    ops: Any, config: ModelConfig, recipe: str, make: Callable[[tuple[int, ...], Format | None, int], Any]
) -> Model:  # fmt: skip
    """A model of a recipe's formats; `make` gets a shape, a format and a seed."""
    weight = bench.weights_of(config, recipe, make)
    return weights.build(config, lambda name: ops.pack(weight(name)), ops.stack)


def meta_weight(shape: tuple[int, ...], kind: Format | None, seed: int) -> torch.Tensor | QuantizedTensor:
    if kind is None:
        return empty(*shape)
    words = empty(*shape[:-1], shape[-1] * kind.bits // 32, dtype=torch.int32)
    scales = empty(*shape[:-1], shape[-1] // kind.group_size)
    return QuantizedTensor(words=words, scales=scales, biases=None, global_scale=None, format=kind)


def test_in_float32_no_kernel_runs_and_nothing_is_captured(checkpoint: Checkpoint) -> None:
    ops = CudaOps("float32", "cpu")
    passes = CardPasses(ops, build(ops, checkpoint), capture=rerun)
    assert (passes.lookahead, passes.read_sizes) == (0, ()) and passes.compile(np.square) is np.square
    got = states(ops, build(ops, checkpoint), 5)  # not in the interpreter: a kernel would fail
    want = states(NumpyOps("float64"), build(NumpyOps("float64"), checkpoint), 5)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


ODD = {
    "k_proj": Format(bits=4, symmetric=True),  # not q's format
    "up_proj": Format(mode="mxfp8", bits=8),  # kernels do not read it
    "experts": Format(mode="mxfp4", bits=4),
}


def test_what_kernels_do_not_read_runs_in_torch(checkpoint: Checkpoint, device: str) -> None:
    """Projections of different formats one by one, and with such experts nothing is captured."""
    oracles = NumpyOps("bfloat16"), NumpyOps("float64")
    rounded, exact = (states(one, build(one, checkpoint, "8bit", **ODD), 5) for one in oracles)
    ops = CudaOps("bfloat16", device)
    model = build(ops, checkpoint, "8bit", **ODD)
    passes = card_passes(ops, model, captured=True)
    assert passes.lookahead == 0 and passes.compile(np.square) is np.square
    with running(device):
        assert_low_precision(states(ops, model, 5), rounded, exact)


def test_experts_results_are_summed_row_by_row() -> None:
    """As the CPU adds them up, whatever order a card would take; rows of three experts each."""
    chosen = torch.tensor([[2, 0, 1], [0, 2, 1], [1, 2, 0], [2, 1, 0]])
    order = chosen.reshape(-1).argsort(stable=True)
    out = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 5)))
    want = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, order // 3, out)
    torch.testing.assert_close(in_order(out, order, 4, torch.float64), want)


def test_stacked_weights_are_views_of_one(checkpoint: Checkpoint) -> None:
    """Stacking copies each weight once and keeps no second copy; the values are those of the parts."""
    stacked, plain = (build(one, checkpoint, "8bit") for one in (CudaOps("bfloat16", "cpu"), InferenceOps("bfloat16")))
    for layer, want in zip(stacked.layers, plain.layers, strict=True):
        for part, other, names, whole_one in (
            (layer.self_attn, want.self_attn, ("q_proj", "k_proj", "v_proj"), layer.self_attn.qkv_proj),
            (layer.mlp, want.mlp, ("gate_proj", "up_proj"), layer.mlp.gate_up_proj),
        ):
            pairs = [(getattr(part, name), getattr(other, name)) for name in names if getattr(part, name) is not None]
            storages = {view.words.untyped_storage().data_ptr() for view, _ in pairs}
            assert storages == {whole_one.words.untyped_storage().data_ptr()}
            assert sum(view.shape[0] for view, _ in pairs) == whole_one.shape[0]
            for view, weight in pairs:
                assert torch.equal(whole(view, torch.float32), whole(weight, torch.float32))
