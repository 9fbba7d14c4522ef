"""A whole model through the kernels: held to the NumPy oracle, and the same tokens captured or not.

On the CPU the kernels run in Triton's interpreter. With `-m gpu` the same tests run compiled, on the first card, and
passes are captured by CUDA itself.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
from dgemma.backends.cuda.graph import Capture, CudaCapture, rerun
from dgemma.backends.cuda.ops import CudaOps
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.backends.torch.blocks import whole
from dgemma.backends.torch.experts import in_order
from dgemma.backends.torch.inference import InferenceOps
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format, quantize
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine, Request
from dgemma.core.events import Commit, Draft
from dgemma.core.model import Cache, Model, denoise, encode, new_cache
from dgemma.core.ops import Ops
from dgemma.tools import bench
from kernel_harness import launched, running
from law import assert_low_precision
from tiny import tiny_checkpoint
from under_test import values

CANVAS, WINDOW = 8, 12
# Every token goes to every expert: between two that all but tie, low precision may choose either, which is another
# answer and no error. That the right ones are chosen is tested where routing is.
SHAPE: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_experts=3, top_k_experts=3, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, canvas_length=CANVAS,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("cuda"), **SHAPE))


def cuda_ops(device: str, *, captured: bool = False) -> CudaOps:
    capture: Capture | None = None
    if captured:
        capture = rerun if device == "cpu" else CudaCapture(torch.device(device))
    return CudaOps("bfloat16", device, capture=capture, encode_sizes=(CANVAS, 12))


def build(ops: Ops, checkpoint: Checkpoint, recipe: str = "bf16", **kinds: Format) -> Model:
    """The checkpoint's weights in bf16, or in a recipe's formats; `kinds` are formats by a part of the name."""
    formats = bench.formats(checkpoint.config, recipe)

    def get(name: str) -> Any:
        kind = next((kind for part, kind in kinds.items() if part in name), formats[name])
        stored = np.asarray(checkpoint.tensor(name))
        return stored.astype(ml_dtypes.bfloat16) if kind is None else quantize(stored, kind)

    return weights.build(ops, checkpoint.config, get)


def states(ops: Ops, model: Model, prompt: int) -> np.ndarray:
    """Two blocks encoded, then one denoising pass: normed states [1, L, D]."""
    config = model.config
    generator = np.random.default_rng(prompt)
    cache = new_cache(ops, config, batch=1, capacity=prompt + CANVAS, chunk=max(prompt, CANVAS))
    for length in (prompt, CANVAS):
        cache = encode(ops, model, cache, ops.asarray(generator.integers(0, config.vocab_size, (1, length), np.int32)))
    canvas = ops.asarray(generator.integers(0, config.vocab_size, (1, CANVAS), np.int32))
    soft = ops.asarray(values(prompt, 1, CANVAS, config.hidden_size), ops.dtype)
    return ops.to_numpy(denoise(ops, model, Cache(cache.layers, cache.length), canvas, soft))


@pytest.mark.parametrize("recipe, prompt", [("bf16", 1), ("8bit", WINDOW), ("4bit", WINDOW + 3)])
def test_a_pass_agrees_with_the_oracle(checkpoint: Checkpoint, device: str, recipe: str, prompt: int) -> None:
    rounded, exact = (
        states(oracle, build(oracle, checkpoint, recipe), prompt)
        for oracle in (NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    ops = cuda_ops(device)
    with running(device):
        got = states(ops, build(ops, checkpoint, recipe), prompt)
    assert_low_precision(got, rounded, exact)


def head(ops: Ops, model: Model) -> list[np.ndarray]:
    x = ops.asarray(values(0, 2, 16, model.config.hidden_size), ops.dtype)
    heat = ops.asarray(np.array([[0.5], [0.8]], np.float32), ops.wide)
    u = ops.asarray(np.random.default_rng(0).random((2, 16), np.float32))
    return [ops.to_numpy(one) for one in ops.vocab_head(x, model.embed_tokens, model.config.softcap, heat, u)]


@pytest.mark.parametrize("recipe", ["bf16", "8bit"])
def test_the_head_agrees_with_the_oracle(checkpoint: Checkpoint, device: str, recipe: str) -> None:
    rounded, exact = (
        head(oracle, build(oracle, checkpoint, recipe)) for oracle in (NumpyOps("bfloat16"), NumpyOps("float64"))
    )
    ops = cuda_ops(device)
    with running(device):
        got = head(ops, build(ops, checkpoint, recipe))
    for i, what in ((2, "entropy"), (3, "soft embedding")):
        assert_low_precision(got[i], rounded[i], exact[i], what)
    same = [(got[i] == exact[i]).mean() for i in (0, 1)]
    assert min(same) > 0.9, f"sampled and argmax tokens of float64: {same}; rounding accounts for a few"


# ---- The loop -----------------------------------------------------------------------------------------------------


def written(ops: CudaOps, model: Model, prompt: int, sampler: SamplerConfig) -> list[Any]:
    request = Request(
        prompt=tuple(20 + i % 200 for i in range(prompt)), max_new_tokens=2 * CANVAS, seed=3, eos_token_ids=(),
        sampler=sampler,
    )  # fmt: skip
    events = Engine(ops, model, None).generate(request)
    seen: list[Any] = []
    for event in events:
        if isinstance(event, Draft):
            seen.append((event.canvas, event.step, event.tokens.tolist(), event.accepted.tolist()))
        elif isinstance(event, Commit):
            seen.append(event.tokens)
    return seen


def test_captured_tokens_are_plain_tokens(checkpoint: Checkpoint, device: str) -> None:
    """The prompt is read in two captured chunks, or at once; the canvas stops by itself, one pass late."""
    sampler = SamplerConfig(steps=2, schedule_steps=2, confidence=1e9, stability=0)
    with running(device):
        captured = cuda_ops(device, captured=True)
        model, plain = build(captured, checkpoint, "4bit"), captured.plain()
        assert (captured.lookahead, plain.lookahead) == (1, 0)
        want, got = (written(one, model, 14, sampler) for one in (plain, captured))
    assert len(want) == 2 + 2 and got == want


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["nano-like", "110m"])
def test_captured_drafts_are_plain_drafts_on_the_card(shape: Any) -> None:
    config = bench.config_of(shape)
    plan = bench.Plan(shape=shape, steps=8, canvases=3, context=1024)
    captured = CudaOps("bfloat16", "cuda", capture=CudaCapture(torch.device("cuda")))
    model = bench.random_model(captured, config, "4bit")
    want, got = (bench.drafts(one, model, plan) for one in (captured.plain(), captured))
    np.testing.assert_array_equal(got, want)


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
    ops = cuda_ops("cpu")
    ops.device = torch.device("meta")  # nothing has contents, and nothing runs
    config = bench.config_of("26b")
    model = bench.random_model(ops, config, recipe, meta_weight)
    cache = Cache(new_cache(ops, config, batch=1, capacity=2048, chunk=256).layers, empty(1, dtype=torch.int32))
    canvas = empty(1, 256, dtype=torch.int32)

    def run() -> None:
        x = denoise(ops, model, cache, canvas, empty(1, 256, config.hidden_size))
        ops.vocab_head(
            x, model.embed_tokens, 30.0, empty(1, 1, dtype=torch.float32), empty(1, 256, dtype=torch.float32)
        )

    assert 0.9 * most < len(launched(run)) <= most


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weight(shape: tuple[int, ...], kind: Format | None, seed: int) -> torch.Tensor | QuantizedTensor:
    if kind is None:
        return empty(*shape)
    words = empty(*shape[:-1], shape[-1] * kind.bits // 32, dtype=torch.int32)
    scales = empty(*shape[:-1], shape[-1] // kind.group_size)
    return QuantizedTensor(words=words, scales=scales, biases=None, global_scale=None, format=kind)


def test_in_float32_no_kernel_runs_and_nothing_is_captured(checkpoint: Checkpoint) -> None:
    ops = CudaOps("float32", "cpu", capture=rerun)
    assert (ops.lookahead, ops.encode_sizes) == (0, ()) and ops.compile(np.square) is np.square
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
    ops = cuda_ops(device, captured=True)
    model = build(ops, checkpoint, "8bit", **ODD)
    assert ops.lookahead == 0 and ops.compile(np.square) is np.square
    with running(device):
        assert_low_precision(states(ops, model, 5), rounded, exact)


def test_experts_results_are_summed_row_by_row() -> None:
    """As the CPU adds them up, whatever order a card would take; rows of three experts each."""
    chosen = torch.tensor([[2, 0, 1], [0, 2, 1], [1, 2, 0], [2, 1, 0]])
    order = chosen.reshape(-1).argsort(stable=True)
    out = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 5)))
    want = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, order // 3, out)
    torch.testing.assert_close(in_order(out, order, 4, torch.float64), want)


def test_joined_weights_are_views_of_one(checkpoint: Checkpoint) -> None:
    """Joining copies each weight once and keeps no second copy; the values are those of the parts."""
    ops, apart = cuda_ops("cpu"), InferenceOps("bfloat16")
    joined, plain = (build(one, checkpoint, "8bit") for one in (ops, apart))
    for layer, want in zip(joined.layers, plain.layers, strict=True):
        for part, other, names in (
            (layer.self_attn, want.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.mlp, want.mlp, ("gate_proj", "up_proj")),
        ):
            pairs = [(getattr(part, name), getattr(other, name)) for name in names if getattr(part, name) is not None]
            assert len({view.words.untyped_storage().data_ptr() for view, _ in pairs}) == 1
            for view, weight in pairs:
                assert torch.equal(whole(view, torch.float32), whole(weight, torch.float32))
