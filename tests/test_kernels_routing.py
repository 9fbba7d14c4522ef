"""Routing and the counting sort on the device: experts as the oracle chooses them, every pair in its place once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import routing
from dgemma.core.parts import Router
from kernel_harness import ARCHITECTURES, compile_ahead_launch, launched, running
from kernel_weights import EXACT, exact, guarded, meta, normal
from law import assert_close_f32

EPS = 1e-6


@pytest.mark.parametrize(
    ("rows", "width", "experts", "k"),
    [(37, 352, 128, 8), (1, 64, 4, 2), (16, 320, 6, 3), (17, 32, 3, 3)],
    ids=["real experts", "one row", "odd experts", "all chosen"],
)
def test_routing_is_the_oracles(device: str, rows: int, width: int, experts: int, k: int) -> None:
    rng = np.random.default_rng(rows)
    r, proj = normal(rng, rows, width, scale=3.0), normal(rng, experts, width, scale=0.2)
    scale, own = normal(rng, width), normal(rng, experts).abs() + 0.5
    given = [x.to(device) for x in (r, proj, scale, own)]
    with running(device), guarded(device):
        weights, index = routing.route(*given, k, EPS)
    router = Router(
        experts=experts, experts_per_token=k, eps=EPS, proj=exact(proj), scale=exact(scale),
        per_expert_scale=exact(own),
    )  # fmt: skip
    want, chosen = EXACT._route(exact(r), router)
    assert weights.dtype == torch.float32 and index.dtype == torch.int32
    order, other = np.argsort(chosen, -1), np.argsort(index.cpu().numpy(), -1)
    np.testing.assert_array_equal(
        np.take_along_axis(index.cpu().numpy(), other, -1), np.take_along_axis(chosen, order, -1)
    )
    assert_close_f32(np.take_along_axis(exact(weights), other, -1), np.take_along_axis(want, order, -1))


def test_of_equal_experts_the_first_are_chosen(device: str) -> None:
    rng = np.random.default_rng(1)
    r, row = normal(rng, 5, 64), normal(rng, 1, 64)
    ones = torch.ones(12, dtype=torch.bfloat16, device=device)
    with running(device):
        weights, index = routing.route(
            r.to(device), row.expand(12, 64).contiguous().to(device), torch.ones_like(r[0]).to(device), ones, 4, EPS
        )
    np.testing.assert_array_equal(index.cpu().numpy(), np.tile(np.arange(4), (5, 1)))
    np.testing.assert_array_equal(weights.cpu().numpy(), np.full((5, 4), 0.25, np.float32))


def chosen(case: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Return index [N, k] and the number of experts."""
    if case == "one row":
        return np.array([[3, 0]]), 5
    if case == "one expert":
        return np.full((41, 1), 2), 4
    if case == "first and last only":
        return np.tile([[0, 127]], (23, 1)), 128
    if case == "more pairs than a block":
        return np.stack([rng.permutation(6)[:4] for _ in range(700)]), 6
    return np.stack([rng.permutation(128)[:8] for _ in range(40)]), 128


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("case", ["one row", "one expert", "first and last only", "more pairs than a block", "real"])
def test_every_pair_has_its_place_and_every_place_its_tile(device: str, case: str, tile: int) -> None:
    index, experts = chosen(case, np.random.default_rng(2))
    with running(device), guarded(device):
        plan = routing.schedule(torch.from_numpy(index.astype(np.int32)).to(device), experts, tile)
    order, (owner, begin, end) = plan.order.cpu().numpy(), plan.tiles.cpu().numpy()
    flat = index.reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    used = end > begin
    count = int(used.sum())
    assert used[:count].all(), "empty tiles come last"
    assert plan.count <= routing.most_tiles(flat.size, experts, tile)
    covered = np.concatenate([np.arange(b, e) for b, e in zip(begin[used], end[used], strict=True)])
    np.testing.assert_array_equal(covered, np.arange(flat.size))
    assert (end - begin <= tile).all()
    for t in range(count):
        assert (flat[order[begin[t] : end[t]]] == owner[t]).all()
    assert count == sum(-(-n // tile) for n in np.bincount(flat, minlength=experts))


def test_the_number_of_tiles_is_enough_for_any_choice_and_reached_by_one() -> None:
    for pairs, experts, tile in [(1, 1, 16), (5, 8, 2), (9, 4, 4), (2048, 128, 32)]:
        worst = np.zeros(experts, int)
        worst[: min(pairs, experts)] = 1
        worst[0] += pairs - worst.sum()
        assert routing.most_tiles(pairs, experts, tile) >= sum(-(-n // tile) for n in worst)
    assert routing.most_tiles(2048, 128, 32) == 128 + 60


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch: str) -> None:
    def run() -> None:
        _, index = routing.route(meta(256, 2816), meta(128, 2816), meta(2816), meta(128), 8, EPS)
        routing.schedule(index, 128, 32)

    for launch in launched(run):
        built = compile_ahead_launch(launch, arch)
        assert built.spills == 0 and built.stack == 0, built
        assert built.shared <= 99 << 10, built
