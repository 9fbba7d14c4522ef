"""Linear layers over packed words: the weights of checkpoints/quant.py, the oracle's products, and what is compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import attention, configs, linear, norm, unpack
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints.quant import Format, dequantize, quantize
from dgemma.core.errors import DgemmaError
from dgemma.core.ops import Ops
from dgemma.core.parts import Mlp
from kernel_harness import ARCHITECTURES, compile_ahead_launch, launched, running
from kernel_weights import EXACT, FORMATS, ROUNDED, exact, guarded, meta, meta_weight, narrow, normal, weight
from law import assert_close_f32, assert_low_precision

PACKED = [form for form in FORMATS if form != "bf16"]
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def cut(rows: int, tokens: int, block: int, split: int = 1) -> configs.Config:
    return configs.Config(rows=rows, tokens=tokens, block=block, stages=2, warps=4, split=split)


@pytest.mark.parametrize("form", PACKED)
def test_the_weights_that_are_multiplied_are_those_that_are_defined(device: str, form: str) -> None:
    """Rows of the identity pick weights out one by one, so nothing is summed and nothing hidden."""
    rng = np.random.default_rng(0)
    made, values = weight(rng, form, 32, 128, device=device)
    with running(device):
        out = linear.linear(torch.eye(128, dtype=torch.bfloat16, device=device), made, config=cut(32, 32, 64))
    got, want = out.float().cpu().numpy().T, narrow(values).astype(np.float32)
    if form != "affine8":
        np.testing.assert_array_equal(got, want)
        return
    # One rounding here, two in the definition, float32's before bf16's: at most one unit in the last place, and rarely.
    differ = got != want
    assert differ.mean() < 1e-3
    np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=0)


def products(ops: Ops, x: Any, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate, up = np.split(made, 2)
    return ops.linear(x, made), ops.geglu(x, Mlp(gate_proj=gate, up_proj=up, down_proj=None))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("split", "block"), [(1, 128), (3, 64)])
def test_products_are_the_oracles(device: str, form: str, split: int, block: int) -> None:
    """Odd numbers of rows on both sides, a K that the block or the split does not divide, NaN behind the last row."""
    rng = np.random.default_rng(1)
    made, values = weight(rng, form, 90, 320, device=device)
    x = normal(rng, 21, 320, scale=3.0)
    fenced = torch.cat([x, torch.full((3, 320), torch.nan, dtype=x.dtype)]).to(device)
    bits = unpack.stored(made).bits
    with running(device):
        laid = unpack.arrange(fenced, bits)[:21]
        with guarded(device):
            plain = linear.linear(laid, made, config=cut(64, 16, block, split), arranged=True)
            gated = linear.geglu(fenced[:21], made, config=cut(64, 16, block))
    want = products(EXACT, exact(x), values.astype(np.float64))
    rounded = products(ROUNDED, narrow(x), narrow(values))
    assert_low_precision(exact(plain), rounded[0], want[0], "linear")
    assert_low_precision(exact(gated), rounded[1], want[1], "geglu")


@pytest.mark.parametrize(("bits", "group", "width"), [(4, 128, 256), (8, 128, 128), (4, 32, 96), (8, 32, 32)])
def test_a_turn_fits_a_row_and_may_be_part_of_a_group(device: str, bits: int, group: int, width: int) -> None:
    values = np.random.default_rng(7).standard_normal((16, width)).astype(np.float32)
    q = quantize(values, Format(bits=bits, group_size=group, symmetric=True))
    made = QuantizedTensor.from_host(q, device)
    with running(device):
        out = linear.linear(torch.eye(width, dtype=torch.bfloat16, device=device), made, config=cut(32, 32, 64))
    np.testing.assert_array_equal(out.float().cpu().numpy().T, narrow(dequantize(q)).astype(np.float32))


def test_one_row_and_none(device: str) -> None:
    rng = np.random.default_rng(2)
    made, values = weight(rng, "symmetric8", 32, 64, device=device)
    x = normal(rng, 1, 64)
    with running(device), guarded(device):
        out = linear.linear(x.to(device), made)
    assert_low_precision(
        exact(out), products(ROUNDED, narrow(x), narrow(values))[0], products(EXACT, exact(x), exact_of(values))[0]
    )
    assert linear.linear(x[:0], made).shape == (0, 32) and linear.geglu(x[:0], made).shape == (0, 16)


def exact_of(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


@pytest.mark.parametrize("form", ["symmetric4", "symmetric8"])
def test_what_geglu_writes_for_a_weight_that_weight_reads(device: str, form: str) -> None:
    rng = np.random.default_rng(3)
    up, _ = weight(rng, "symmetric8", 128, 64, device=device)
    down, _ = weight(rng, form, 40, 64, device=device)
    x = normal(rng, 5, 64).to(device)
    bits = unpack.stored(down).bits
    with running(device):
        direct = linear.linear(linear.geglu(x, up, out_bits=bits, config=cut(64, 16, 64)), down, arranged=True)
        around = linear.linear(linear.geglu(x, up, config=cut(64, 16, 64)), down)
    assert torch.equal(direct, around)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_norms_and_attention_write_for_a_weight_is_arranged(device: str, bits: int) -> None:
    rng = np.random.default_rng(6)
    x, w = normal(rng, 3, 96).to(device), normal(rng, 96).to(device)
    q, cache = normal(rng, 1, 5, 4, 32).to(device).transpose(1, 2), normal(rng, 1, 2, 64, 32).to(device)
    rows = torch.tensor([40], dtype=torch.int32, device=device)
    alone = attention.Tiling(rows=16, keys=16, warps=4, stages=1, programs=1)

    def attend(sizes: attention.Tiling, bits: int = 16) -> torch.Tensor:
        out = attention.attention(q, cache, cache, rows, window=None, causal=False, sizes=sizes, bits=bits)
        return out.view(5, 128)

    with running(device):
        assert torch.equal(norm.rms_norm(x, w, 1e-6, bits=bits), unpack.arrange(norm.rms_norm(x, w, 1e-6), bits))
        plain = norm.norm_add(x, x, w, 1e-6, next_weights=(w, w))
        laid = norm.norm_add(x, x, w, 1e-6, next_weights=(w, w), next_bits=(bits, 12 - bits))
        want = [plain[0], unpack.arrange(plain[1], bits), unpack.arrange(plain[2], 12 - bits)]
        assert all(map(torch.equal, laid, want))
        results, shares = normal(rng, 3 * 4, 96).to(device), torch.rand(3, 4, device=device)
        summed = (results.view(3, 4, 96).float() * shares[..., None]).sum(1)
        want = norm.mix_norm_add(x.float(), summed, x.float(), w.float(), w.float(), w.float(), 1e-6)
        got = norm.mix_norm_add(
            x.float(), results.float(), x.float(), w.float(), w.float(), w.float(), 1e-6, shares=shares
        )
        assert_close_f32(got[0].cpu().numpy(), want[0].cpu().numpy(), "the experts' last sum, inside the norm")
        for sizes in (alone, replace(alone, programs=64)):  # one part of the keys, and several that are merged
            assert torch.equal(attend(sizes, bits), unpack.arrange(attend(sizes), bits))


@pytest.mark.parametrize("form", FORMATS)
def test_stacked_weights_are_their_parts(form: str) -> None:
    rng = np.random.default_rng(4)
    parts = [weight(rng, form, rows, 64)[0] for rows in (3, 8, 1)]
    whole = linear.stacked(parts)
    assert tuple(whole.shape) == (12, 64)
    if isinstance(whole, torch.Tensor):
        assert torch.equal(whole, torch.cat(parts))
        return
    for name in ("words", "scales", "biases", "global_scale"):
        pieces = [getattr(part, name) for part in parts]
        assert (getattr(whole, name) is None) == (pieces[0] is None)
        if pieces[0] is not None:
            assert torch.equal(getattr(whole, name), torch.cat(pieces)), name


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(DgemmaError, match="one format"):
        linear.stacked([meta_weight("symmetric4", 4, 64), meta_weight("symmetric8", 4, 64)])
    with pytest.raises(DgemmaError, match=r"rows \[3, 128\] and a weight \[4, 64\] do not fit"):
        linear.linear(meta(3, 128), meta_weight("symmetric4", 4, 64))
    with pytest.raises(DgemmaError, match=r"bfloat16 activations \[N, K\], not torch.float32 \[3, 64\]"):
        linear.linear(meta(3, 64, dtype=torch.float32), meta_weight("symmetric4", 4, 64))
    with pytest.raises(DgemmaError, match=r"do not read torch.float32 weights of shape \[4, 64\]"):
        linear.geglu(meta(3, 64), meta(4, 64, dtype=torch.float32))


def test_dense_bf16_is_torchs_own_product() -> None:
    rng = np.random.default_rng(5)
    x, w = normal(rng, 3, 16), normal(rng, 5, 16)
    assert torch.equal(linear.linear(x, w), torch.nn.functional.linear(x, w))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["symmetric4", "symmetric8"])
def test_shipped_cuts_compile_without_spills(arch: str, form: str) -> None:
    packed = meta_weight(form, 4224, 2816)
    for config in configs.LINEAR[int(arch.removeprefix("sm_"))][unpack.stored(packed).bits]:
        calls = [lambda c=config: linear.linear(meta(256, 2816), packed, config=c)]
        if form == "symmetric8":  # what the 4-bit and 8-bit recipes have in attention and dense MLP
            calls.append(lambda c=config: linear.geglu(meta(256, 2816), packed, out_bits=8, config=c))
            calls.append(lambda c=config: linear.linear(meta(256, 2112), meta_weight(form, 2816, 2112), config=c))
        for call in calls:
            launch = next(one for one in launched(call) if one.name in ("linear_kernel", "geglu_kernel"))
            built = compile_ahead_launch(launch, arch)
            assert built.spills == 0 and built.stack == 0, (config, built)
            assert built.shared <= SHARED[arch], (config, built)
            assert not built.serialized, (config, built)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("rows, width", [(8192, 2816), (2816, 2112)])
def test_matrix_instructions_of_a_product_in_parts_do_not_wait_for_one_another(
    rows: int, width: int, split: int
) -> None:
    """Where a loop may not turn at all, the assembler lets each wait for the one before, and says so."""
    for config in configs.LINEAR[90][8][::2]:
        packed = meta_weight("symmetric8", rows, width)
        cut = replace(config, split=split)
        calls = launched(lambda w=packed, cut=cut: linear.linear(meta(256, w.shape[1]), w, config=cut))
        built = compile_ahead_launch(calls[1], "sm_90")
        assert built.name == "linear_kernel" and not built.serialized and not built.spills, built


def test_every_multiprocessor_has_a_program_where_the_shape_allows() -> None:
    hopper = configs.Card(generation=90, multiprocessors=132)
    for shape in ((8192, 2816), (2816, 4096), (4224, 2816), (2816, 2112)):
        for rows in (256, 512, 1024):
            config = configs.for_linear(hopper, "linear", 8, shape, rows)
            assert -(-shape[0] // config.rows) * -(-rows // config.tokens) >= 0.9 * 132, (shape, rows, config)
