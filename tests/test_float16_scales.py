"""float16 scales, as GGUF and MLX's float16 models have them: kept, since bf16 would round, on every backend."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import linear
from dgemma.backends.mlx.ops import MlxOps
from dgemma.backends.mlx.packed import QuantizedTensor as MlxTensor
from dgemma.backends.torch import packed as torch_packed
from dgemma.checkpoints.quant import Format, QTensor, carry, dequantize, is_symmetric, to_bf16
from dgemma.checkpoints.quant_bits import unpack
from kernel_harness import running
from law import assert_close_f32
from said import says

FORMATS = (
    *(Format(bits=bits, group_size=32, symmetric=True) for bits in (4, 5, 8)),
    *(Format(bits=bits, group_size=32) for bits in (4, 5, 8)),
)


def name(kind: Format) -> str:
    return f"{'symmetric' if kind.symmetric else 'affine'}{kind.bits}"


def random_tensor(kind: Format, *shape: int, seed: int = 0) -> QTensor:
    """Any codes; scales of eleven significant bits, of either sign, subnormal ones among them."""
    draw = np.random.default_rng(seed)
    words = draw.integers(0, 2**32, (*shape[:-1], kind.words_per_row(shape[-1])), np.uint32)
    grouped = (*shape[:-1], kind.groups_per_row(shape[-1]))
    scales = (draw.standard_normal(grouped) * np.exp2(draw.integers(-22, -3, grouped))).astype(np.float16)
    biases = None if kind.symmetric else draw.normal(0, 0.1, grouped).astype(np.float16)
    return QTensor(words=words, scales=scales, biases=biases, format=kind)


def definition(q: QTensor) -> np.ndarray:
    """scale·q + bias in float64, rounded to float32 once."""
    codes = unpack(q.words, q.format.bits).astype(np.float64).reshape(*q.scales.shape, -1)
    scales = q.scales.astype(np.float64)[..., None]
    middle = float(1 << (q.format.bits - 1))
    value = codes * scales + (q.biases.astype(np.float64)[..., None] if q.biases is not None else -middle * scales)
    return value.astype(np.float32).reshape(q.shape)


@pytest.mark.parametrize("kind", FORMATS, ids=name)
def test_values_are_the_definition_on_every_backend(kind: Format) -> None:
    q = random_tensor(kind, 3, 4, 128)
    want = definition(q)
    np.testing.assert_array_equal(dequantize(q), want)
    for width, kept in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        got = torch_packed.dequantize(torch_packed.QuantizedTensor.from_host(q), width)
        bits = got.view(torch.int16).numpy().view(np.uint16) if kept == "bfloat16" else got.numpy()
        np.testing.assert_array_equal(bits, dequantize(q, kept))
    for dtype in ("float32", "bfloat16"):
        held = MlxOps(dtype, compile=False).pack(q)  # pyright: ignore[reportArgumentType]
        assert isinstance(held, MlxTensor) and held.scales.dtype == (mx.float32 if dtype == "float32" else mx.float16)
        np.testing.assert_array_equal(np.array(held.dequantized()), want)
        x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
        made = held[1:2].product(mx.array(x)[None], transpose=True) if dtype == "float32" else None
        if made is not None:
            assert_close_f32(np.array(made)[0], x @ want[1].astype(np.float64).T)


def test_a_bias_too_large_for_float16_is_wide_on_mlx() -> None:
    kind = Format(bits=8, group_size=32, symmetric=True)
    q = random_tensor(kind, 2, 32)
    q = QTensor(words=q.words, scales=np.full((2, 1), 1000, np.float16), format=kind)
    held = MlxOps("bfloat16", compile=False).pack(q)
    np.testing.assert_array_equal(np.array(held.dequantized()), definition(q))
    with says("NaN or infinity"):  # which a file of MLX's layout cannot hold
        carry(q.words, q.scales, q.mlx_biases(), format=Format(bits=8, group_size=32))


@pytest.mark.parametrize("kind", [one for one in FORMATS if one.bits != 5], ids=name)
def test_the_kernels_multiply_by_the_definition_rounded_once(device: str, kind: Format) -> None:
    q = random_tensor(kind, 32, 128)
    with running(device):
        made: Any = torch_packed.QuantizedTensor.from_host(q, device)
        out = linear.linear(torch.eye(128, dtype=torch.bfloat16, device=device), made)
    got = to_bf16(out.float().cpu().numpy().T)
    if kind.symmetric:
        np.testing.assert_array_equal(got, dequantize(q, "bfloat16"))
        return
    # The definition rounds a sum to float32 before bf16; a compiler may fuse the two.
    assert (got != dequantize(q, "bfloat16")).mean() < 1e-3


def test_weights_share_a_product_only_where_their_scales_have_one_width(device: str) -> None:
    kind = FORMATS[0]
    half = random_tensor(kind, 4, 128)
    brain = QTensor(words=half.words, scales=to_bf16(half.scales.astype(np.float32)), format=kind)
    made = [torch_packed.QuantizedTensor.from_host(one, device) for one in (half, brain)]
    with says("one format"):
        linear.stacked(made)


def test_symmetry_is_seen_in_either_width() -> None:
    q = random_tensor(FORMATS[0], 4, 128)
    biases = q.mlx_biases()
    assert biases is not None and biases.dtype == np.float16 and is_symmetric(q.scales, biases, 4)
    assert not is_symmetric(q.scales, biases * np.float16(1.5), 4)
    assert not is_symmetric(q.scales, to_bf16(biases.astype(np.float32)), 4)
    affine = carry(q.words, q.scales, biases, format=Format(bits=4, group_size=32))
    np.testing.assert_array_equal(dequantize(affine), dequantize(q))
    bad = q.scales.copy()
    bad[0, 0] = np.nan
    with says("NaN or infinity"):
        carry(q.words, bad, format=FORMATS[0])
