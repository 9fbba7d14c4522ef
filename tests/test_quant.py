"""Formats against MLX's own: the same values bit for bit, the same words, and never a larger error."""

import hashlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dgemma.checkpoints.quant as quant
from dgemma.checkpoints.quant import (
    Format,
    carry,
    dequantize,
    pack,
    quantize,
    relative_error,
    to_bf16,
    unpack,
)
from dgemma.core.errors import DgemmaError

mx = pytest.importorskip("mlx.core")
pytestmark = pytest.mark.filterwarnings("error")

AFFINE = [Format(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
SYMMETRIC = [Format(bits=bits, group_size=32, symmetric=True) for bits in (2, 3, 4, 5, 6, 8)]
FLOAT = [
    Format(mode="mxfp4"), Format(mode="mxfp8", bits=8), Format(mode="nvfp4", group_size=16),
]  # fmt: skip
formats = st.sampled_from(AFFINE + SYMMETRIC + FLOAT)
seeds = st.integers(0, 2**32 - 1)


def name(kind: Format) -> str:
    return f"{kind.mode}{kind.bits}g{kind.group_size}{'s' * kind.symmetric}"


def distribution(which: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    draw = {
        "normal": lambda: generator.standard_normal(shape),
        "laplace": lambda: generator.laplace(size=shape),
        "t5": lambda: generator.standard_t(5, size=shape),
    }[which]()
    return as_bf16(0.02 * draw.astype(np.float32))  # what checkpoints hold, and what makes MLX store bf16 scales


def as_bf16(w: np.ndarray) -> np.ndarray:
    return quant.from_bf16(to_bf16(w))


def mlx_quantize(w: np.ndarray, kind: Format) -> tuple[np.ndarray, ...]:
    """Words and scales (and biases) as MLX stores them for a bf16 weight."""
    parts = mx.quantize(
        mx.array(w).astype(mx.bfloat16), group_size=kind.group_size, bits=kind.bits, mode=kind.mode, stream=mx.cpu
    )
    return tuple(np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part) for part in parts)


def mlx_dequantize(q: quant.QTensor, dtype: str, amax: np.float32 | None = None) -> np.ndarray:
    """mx.dequantize under the one-rounding definition: affine scales in float32. Reads what a checkpoint would hold."""
    parts = [mx.array(q.scales)]
    biases = q.mlx_biases()
    if biases is not None:
        parts = [mx.array(part).view(mx.bfloat16).astype(mx.float32) for part in (q.scales, biases)]
    kind = q.format
    factor = None if q.global_scale is None else mx.array(amax)
    result = mx.dequantize(
        mx.array(q.words), *parts, group_size=kind.group_size, bits=kind.bits, mode=kind.mode, global_scale=factor,
        dtype=getattr(mx, dtype), stream=mx.cpu,
    )  # fmt: skip
    return np.array(result.view(mx.uint16) if dtype == "bfloat16" else result)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to the bit, signs of zero included; a NaN for a NaN, of whatever payload."""
    wide = [quant.from_bf16(x) if x.dtype == np.uint16 else x for x in (got, want)]
    np.testing.assert_array_equal(*wide)
    np.testing.assert_array_equal(*(np.signbit(x) & ~np.isnan(x) for x in wide))


def random_tensor(kind: Format, shape: tuple[int, ...], seed: int) -> quant.QTensor:
    """Any bits at all for codes and scales, as long as nothing stored is NaN or infinite."""
    generator = np.random.default_rng(seed)
    width = shape[-1]
    words = generator.integers(0, 2**32, (*shape[:-1], kind.words_per_row(width)), np.uint32)
    grouped = (*shape[:-1], kind.groups_per_row(width))
    if kind.mode != "affine":
        scales = generator.integers(0, 255 if kind.mode != "nvfp4" else 127, grouped, np.uint8)
        return carry(words, scales, format=kind)
    stored = [generator.integers(0, 2**16, grouped, np.uint16) for _ in range(1 if kind.symmetric else 2)]
    for part in stored:
        part[(part & 0x7F80) == 0x7F80] &= 0xBFFF
    return carry(words, *stored, format=kind)


@st.composite
def shapes(draw: st.DrawFn, kind: Format) -> tuple[int, ...]:
    leading = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    size = max(kind.group_size, 32)  # MLX's CPU path for nvfp4 fails on tensors of an odd number of groups
    return (*leading, size * draw(st.integers(1, 9)))


# Formats.


@pytest.mark.parametrize("kind", AFFINE + SYMMETRIC + FLOAT, ids=name)
def test_a_format_survives_config_json(kind: Format) -> None:
    assert Format.from_config(kind.to_config()) == kind
    assert set(kind.to_config(mlx=True)) == {"group_size", "bits", "mode"}


def test_formats_read_the_entries_of_mlx_community() -> None:
    entry = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert Format.from_config(entry) == Format.from_config({"group_size": 64, "bits": 4}) == Format(group_size=64)
    assert Format(group_size=64).to_config() == entry
    assert Format.from_config({"mode": "nvfp4"}) == Format(mode="nvfp4", group_size=16)


def test_bits_per_weight() -> None:
    kinds = [Format(symmetric=True), Format(group_size=64), Format(bits=8, group_size=64), *FLOAT]
    assert [kind.bits_per_weight for kind in kinds] == [4.5, 4.5, 8.5, 4.25, 8.25, 4.5]
    for kind in AFFINE + SYMMETRIC + FLOAT:
        w = np.ones((3, 768), np.float32)
        assert quantize(w, kind).nbytes * 8 == w.size * kind.bits_per_weight
    assert Format(bits=3).words_per_row(704) == 66


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6 or 8 bits, not 7"),
        ({"bits": "4"}, "bits, not '4'"),
        ({"group_size": 16}, "32, 64 or 128, not 16"),
        ({"mode": "nvfp4"}, "nvfp4 has 4 bits in groups of 16"),
        ({"mode": "mxfp4", "symmetric": True}, "symmetric is an option of affine"),
        ({"mode": "gguf"}, "unknown quantization mode 'gguf'"),
        ({"symmetric": 1}, "true or false"),
        ({"zero": 1}, "unknown key 'zero'"),
    ],
)
def test_a_wrong_format_is_refused_in_one_line(options: dict, said: str) -> None:
    with pytest.raises(DgemmaError, match=said) as caught:
        Format.from_config({"group_size": 32} | options)
    assert "\n" not in str(caught.value)


# Bits.


@given(st.sampled_from((2, 3, 4, 5, 6, 8)), st.integers(1, 4), seeds)
@settings(max_examples=40, deadline=None)
def test_packing_is_one_little_endian_bit_stream(bits: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, 3, 32 * blocks))
    words = pack(codes, bits)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes[1, 2]))
    assert words[1, 2].astype("<u4").tobytes() == stream.to_bytes(4 * blocks * bits, "little")
    np.testing.assert_array_equal(unpack(words, bits), codes)


def test_packing_refuses_what_does_not_fit() -> None:
    for codes, bits, said in [
        (np.full(32, 8), 3, "does not fit in 3 bits"),
        (np.full(32, -1), 3, "does not fit"),
        (np.zeros(16, int), 3, "multiple of 32"),
        (np.zeros(32, int), 7, "not 7"),
    ]:
        with pytest.raises(DgemmaError, match=said):
            pack(codes, bits)
    with pytest.raises(DgemmaError, match="no whole number"):
        unpack(np.zeros(4, np.uint32), 3)


def test_bf16_rounds_as_mlx_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    edges = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F8000, 0x7F7FFFFF, 0x80000001, 0x00008000, 0x00018000]
    x = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(to_bf16(x), np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16)))
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(quant.from_bf16(to_bf16(nans))).all()


# Values.


@given(st.data(), formats, seeds, st.sampled_from(("float32", "bfloat16", "float16")))
@settings(max_examples=150, deadline=None)
def test_dequantize_is_mlx_bit_for_bit(data: st.DataObject, kind: Format, seed: int, dtype: str) -> None:
    q = random_tensor(kind, data.draw(shapes(kind)), seed)
    want = mlx_dequantize(q, dtype if kind.mode == "affine" or dtype != "float16" else "float32")
    with np.errstate(over="ignore"):
        want = want.astype(np.float16) if dtype == "float16" else want  # MLX takes 2^scale in float16, which underflows
    got = dequantize(q, dtype)
    assert got.shape == q.shape
    assert_same_bits(got, want)


@pytest.mark.parametrize("kind", FLOAT, ids=name)
def test_every_code_under_every_scale_is_mlx(kind: Format) -> None:
    width = max(kind.group_size, 1 << kind.bits)
    words = np.tile(pack(np.arange(width) % (1 << kind.bits), kind.bits), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], width // kind.group_size, 1)
    for dtype in ("float32", "bfloat16"):
        q = quant.QTensor(words=words, scales=scales, format=kind)
        assert_same_bits(dequantize(q, dtype), mlx_dequantize(q, dtype))
    if kind.mode == "nvfp4":
        for amax in np.array([0.123, 1.7, 33.0, 1e-4, 2688.0], np.float32):
            q = quant.QTensor(words=words, scales=scales, global_scale=amax / np.float32(2688), format=kind)
            assert_same_bits(dequantize(q), mlx_dequantize(q, "float32", amax))


def test_a_global_scale_for_each_row_is_a_tensor_for_each_row() -> None:
    """Experts that were quantized one by one: rows mean what they mean alone, under their own factor."""
    kind = FLOAT[2]
    q = random_tensor(kind, (3, 4, 64), 0)
    amax = np.random.default_rng(1).uniform(1.0, 5000.0, (3, 4, 1)).astype(np.float32)
    factors = amax / np.float32(2688)
    scaled = carry(q.words, q.scales, format=kind, global_scale=factors)
    for dtype in ("float32", "bfloat16"):
        whole = dequantize(scaled, dtype)
        for i, j in np.ndindex(3, 4):
            row = np.s_[i, j : j + 1]
            alone = carry(q.words[row], q.scales[row], format=kind, global_scale=factors[i, j, 0])
            assert_same_bits(whole[row], dequantize(alone, dtype))
            if dtype == "float32":  # with a global scale MLX gives no other
                assert_same_bits(whole[row], mlx_dequantize(alone, dtype, amax[i, j, 0]))
    assert_same_bits(dequantize(scaled[1]), dequantize(scaled)[1])
    assert_same_bits(dequantize(scaled.rows()), dequantize(scaled).reshape(12, 64))
    with pytest.raises(DgemmaError, match="global scale should be one float32"):
        carry(q.words, q.scales, format=kind, global_scale=factors[:, :1])


@given(st.data(), formats, seeds)
@settings(max_examples=60, deadline=None)
def test_what_mlx_quantized_is_carried_as_it_stands(data: st.DataObject, kind: Format, seed: int) -> None:
    kind = Format(mode=kind.mode, bits=kind.bits, group_size=kind.group_size)
    w = distribution("normal", data.draw(shapes(kind)), seed)
    words, *rest = mlx_quantize(w, kind)
    q = carry(words, *rest, format=kind)
    assert q.shape == w.shape and q.words is words
    np.testing.assert_array_equal(pack(unpack(words, kind.bits), kind.bits), words)
    np.testing.assert_array_equal(dequantize(q), mlx_dequantize(q, "float32"))


@pytest.mark.parametrize("kind", SYMMETRIC, ids=name)
def test_symmetric_is_affine_without_its_biases(kind: Format) -> None:
    q = quantize(distribution("normal", (4, 6, 320)), kind)
    biases = q.mlx_biases()
    assert biases is not None and quant.is_symmetric(q.scales, biases, kind.bits)
    np.testing.assert_array_equal(quant.from_bf16(biases), -(2.0 ** (kind.bits - 1)) * quant.from_bf16(q.scales))
    affine = carry(q.words, q.scales, biases, format=Format(bits=kind.bits))
    np.testing.assert_array_equal(dequantize(affine), dequantize(q))
    back = carry(q.words, q.scales, biases, format=kind)
    assert back.biases is None
    with pytest.raises(DgemmaError, match="not symmetric"):
        carry(q.words, q.scales, biases ^ 1, format=kind)


def test_rows_and_experts_are_indexed_alike() -> None:
    q = quantize(distribution("normal", (3, 5, 128)), Format(group_size=64))
    whole = dequantize(q)
    for index in (1, slice(1, 3), (2, 4), (slice(None), np.array([3, 0])), np.array([[2], [0]])):
        np.testing.assert_array_equal(dequantize(q[index]), whole[index])
    assert np.shares_memory(q[1].words, q.words) and q.rows().shape == (15, 128)


# Errors.


@pytest.mark.parametrize("which", ["normal", "laplace", "t5"])
@pytest.mark.parametrize("kind", AFFINE + FLOAT, ids=name)
def test_error_is_at_most_mlx(kind: Format, which: str) -> None:
    w = distribution(which, (256, 1408))
    ours, theirs = (relative_error(w, q) for q in (quantize(w, kind), carry(*mlx_quantize(w, kind), format=kind)))
    assert ours <= theirs * (1 + 1e-9)
    if kind.mode == "affine":
        assert ours < 0.97 * theirs  # and not by luck


def test_error_of_the_formats_that_recipes_use() -> None:
    normal, laplace = (distribution(which, (512, 2816)) for which in ("normal", "laplace"))
    assert relative_error(normal, quantize(normal, Format(bits=8, group_size=64))) <= 0.0056
    default = Format(bits=4, symmetric=True)
    assert default.bits_per_weight == 4.5
    assert relative_error(normal, quantize(normal, default)) <= 0.0815
    assert relative_error(laplace, quantize(laplace, default)) <= 0.1025
    assert relative_error(normal, quantize(normal, Format(bits=8, symmetric=True))) <= 0.0052
    kind = Format(mode="nvfp4", group_size=16)
    scaled = quantize(normal, kind, global_scale=quant.nvfp4_global_scale(normal))
    assert relative_error(normal, scaled) <= 0.082


@given(formats, seeds, st.integers(-90, 90))
@settings(max_examples=40, deadline=None)
def test_a_power_of_two_scales_the_result(kind: Format, seed: int, exponent: int) -> None:
    w = distribution("t5", (6, 256), seed) * np.float32(50)
    power = np.float32(2.0**exponent)
    factor = power if kind.mode == "nvfp4" else None  # its own scales reach from 2^-9 to 448 only
    q, scaled = quantize(w, kind), quantize(w * power, kind, global_scale=factor)
    assume(not kind.stores_biases or exponent > -8)  # MLX's grid is a candidate, and its scales end at 1e-7
    np.testing.assert_array_equal(scaled.words, q.words)
    np.testing.assert_array_equal(dequantize(scaled), dequantize(q) * power)


def odd_groups(size: int) -> dict[str, np.ndarray]:
    """Groups unlike the noise that the search was tuned on, [64, size] each."""
    generator = np.random.default_rng(1)
    shape = (64, size)
    noise = generator.standard_normal(shape)
    return {
        case: as_bf16(np.broadcast_to(w, shape).astype(np.float32))
        for case, w in {
            "constant": 0.37 + 0.1 * noise[:, :1],
            "spike": np.where(np.arange(size) == size // 3, -3 + 0.3 * noise, 0),
            "little offset": 1 + 0.03 * noise,
            "offset": 1 + 1e-3 * noise,
            "two values": np.where(noise > 0, 0.25, -0.5),
            "one sign": np.abs(noise),
            "many magnitudes": noise * np.logspace(-20, 0, size),
            "cubed": noise**3,
            "sparse": np.where(generator.random(shape) < 0.1, noise, 0),
            "cauchy": np.clip(generator.standard_cauchy(shape), -1e3, 1e3),
            "uniform": generator.random(shape) - 0.5,
            "whole numbers": np.rint(2 * noise),
            "large": noise * 1e3 / np.abs(noise).max(),
        }.items()
    }


@pytest.mark.parametrize("kind", AFFINE + FLOAT, ids=name)
def test_no_group_is_worse_than_mlx(kind: Format) -> None:
    for case, w in odd_groups(kind.group_size).items():
        ours, theirs = quantize(w, kind), carry(*mlx_quantize(w, kind), format=kind)
        for row in range(len(w)):
            error, limit = (relative_error(w[row], q[row]) for q in (ours, theirs))
            assert error <= limit * (1 + 1e-5) + 1e-12, f"{case}, row {row}"


@pytest.mark.parametrize("kind", AFFINE + SYMMETRIC + FLOAT, ids=name)
def test_groups_at_the_ends_of_float32(kind: Format) -> None:
    noise = distribution("normal", (4, 256)) * np.float32(50)
    largest = np.float32(2.0**125)
    factor = largest / np.float32(2688) if kind.mode == "nvfp4" else None
    widest = np.where(noise > 0, largest, -largest)
    value = dequantize(quantize(widest, kind, global_scale=factor))
    np.testing.assert_allclose(value, widest, rtol=0.5 if kind.bits == 2 else 0.2)
    for w in (np.float32(1e-36) * noise, np.float32(1e-41) * noise, np.full_like(noise, 1e-45)):
        value = dequantize(quantize(w, kind))
        assert np.isfinite(value).all() and np.abs(value).max() <= 4 * np.abs(w).max()
    for zero in (np.zeros_like(noise), -np.zeros_like(noise)):
        assert not dequantize(quantize(zero, kind)).any()
    if kind.stores_biases:
        for constant in (0.37, -1.7e-3, 1e9):
            w = np.full_like(noise, constant)
            np.testing.assert_allclose(dequantize(quantize(w, kind)), w, rtol=2e-5)


# Determinism.


def same(a: quant.QTensor, b: quant.QTensor) -> bool:
    return all(
        (x is None and y is None) or np.array_equal(x, y)
        for x, y in ((a.words, b.words), (a.scales, b.scales), (a.biases, b.biases))
    )


@given(st.data(), formats, seeds)
@settings(max_examples=60, deadline=None)
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(data: st.DataObject, kind: Format, seed: int) -> None:
    w = distribution("t5", data.draw(shapes(kind)), seed)
    whole = quantize(w, kind)
    strided = np.repeat(w, 2, axis=-1)[..., ::2]
    turned = np.asfortranarray(w)
    for other in (strided, turned, w[::-1].copy()[::-1], to_bf16(w)):
        assert same(quantize(other, kind), whole)
    rows = w.reshape(-1, w.shape[-1])
    last = quantize(rows[-1], kind)
    assert same(last, whole.rows()[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "CHUNK", data.draw(st.sampled_from((1, 256, 1000))))
        assert same(quantize(w, kind), whole)
        assert same(quantize(turned, kind, workers=3), whole)
        np.testing.assert_array_equal(dequantize(whole), dequantize(whole.rows()).reshape(w.shape))


def test_workers_write_the_same_bytes() -> None:
    w = distribution("normal", (7, 96, 704))
    for kind in (Format(symmetric=True), Format(bits=5, group_size=64), Format(mode="nvfp4", group_size=16)):
        assert same(quantize(w, kind, workers=4), quantize(w, kind))


def test_the_bytes_are_the_same_on_every_machine() -> None:
    generator = np.random.Generator(np.random.PCG64(7))
    w = generator.integers(-(2**15), 2**15, (64, 1024)).astype(np.float32)
    w *= np.abs(w) * np.float32(2.0**-36)
    digest = hashlib.sha256()
    for kind in AFFINE + SYMMETRIC + FLOAT:
        q = quantize(w, kind)
        for part in (q.words, q.scales, q.biases):
            digest.update(b"" if part is None else part.tobytes())
    assert digest.hexdigest() == GOLDEN


GOLDEN = "f4960587aa215e3c0f6ae05bb9e5a40095060a053f125f8c3fc5a805c6e4489c"


# Refusals.


@pytest.mark.parametrize("kind", [Format(), Format(symmetric=True), *FLOAT], ids=name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_nan_and_infinity_are_refused(kind: Format, bad: float) -> None:
    w = distribution("normal", (40, 4096))
    w[33, 77] = bad
    with pytest.raises(DgemmaError, match="NaN or infinity" if not np.isfinite(bad) else "magnitude of 1e"):
        quantize(w, kind, workers=2)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    w, kind = np.zeros((2, 96), np.float32), Format(group_size=64)
    words, scales = np.zeros((2, 16), np.uint32), np.zeros((2, 2), np.uint16)
    nan = np.full((2, 2), 0x7FC0, np.uint16)
    q = quantize(np.zeros((2, 128), np.float32), kind)
    cases = [
        (lambda: quantize(w, kind), "rows of 96 weights do not divide into groups of 64"),
        (lambda: quantize(w.astype(np.float64), Format()), "not float64"),
        (lambda: quantize(np.float32(1), Format()), "not float32"),
        (lambda: quantize(w, Format(), global_scale=1.0), "belongs to nvfp4"),
        (lambda: quantize(w, FLOAT[2], global_scale=0.0), "positive"),
        (lambda: quantize(w + 3000, FLOAT[2]), "give nvfp4 a global scale"),
        (lambda: dequantize(q, "int8"), "cannot dequantize to 'int8'"),
        (lambda: carry(words, scales, format=kind), "needs biases"),
        (lambda: carry(words, scales, scales, format=FLOAT[0]), "scales should be uint8"),
        (lambda: carry(words, scales, scales[:1], format=kind), "biases should be uint16"),
        (lambda: carry(words.astype(np.int32), scales, scales, format=kind), "words should be uint32"),
        (lambda: carry(words[:, :5], scales, scales, format=kind), "do not divide"),
        (lambda: carry(words, nan, scales, format=kind), "NaN"),
        (lambda: carry(words, scales, nan, format=kind), "NaN"),
        (lambda: relative_error(w, q), "differ in shape"),
    ]  # fmt: skip
    for call, said in cases:
        with pytest.raises(DgemmaError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
