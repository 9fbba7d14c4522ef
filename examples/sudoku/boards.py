"""Sudoku boards with one solution each: made, shuffled, split and checked, with NumPy alone.

A board is a row of side*side small integers, 0 for a blank. Training never sees a finished list of boards: a few
thousand minimal ones are dug once, and every batch shuffles them by the symmetries of the game and fills in some of
the blanks. Both keep the solution unique, and turn each dug board into millions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

BLANKS = "._0*"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A board of side x side cells in boxes of box_rows x box_cols."""

    side: int
    box_rows: int
    box_cols: int

    @property
    def cells(self) -> int:
        return self.side * self.side


SIZES = {
    4: Size(side=4, box_rows=2, box_cols=2),
    6: Size(side=6, box_rows=2, box_cols=3),
    9: Size(side=9, box_rows=3, box_cols=3),
}


@cache
def units(size: Size) -> tuple[tuple[int, ...], ...]:
    """The cells of every row, column and box."""
    n, index = size.side, np.arange(size.cells).reshape(size.side, size.side)
    boxes = index.reshape(n // size.box_rows, size.box_rows, n // size.box_cols, size.box_cols)
    groups = [*index, *index.T, *boxes.transpose(0, 2, 1, 3).reshape(n, n)]
    return tuple(tuple(int(cell) for cell in group) for group in groups)


@cache
def peers(size: Size) -> tuple[tuple[int, ...], ...]:
    """For every cell, the cells that may not hold its digit."""
    return tuple(
        tuple(sorted({other for unit in units(size) if cell in unit for other in unit} - {cell}))
        for cell in range(size.cells)
    )


# --- solving: candidates are bit masks, the cell with the fewest is tried first -----------------------------------


def _place(masks: list[int], cell: int, bit: int, size: Size) -> bool:
    """Write one digit and everything that follows from cells with a single candidate left; False on a contradiction."""
    masks[cell] = bit
    pending = [cell]
    while pending:
        done = pending.pop()
        value = masks[done]
        for other in peers(size)[done]:
            if masks[other] & value:
                masks[other] &= ~value
                if not masks[other]:
                    return False
                if not masks[other] & (masks[other] - 1):
                    pending.append(other)
    return True


def _search(masks: list[int], size: Size, found: list[list[int]], limit: int, rng: np.random.Generator | None) -> None:
    open_cells = [(mask.bit_count(), cell) for cell, mask in enumerate(masks) if mask & (mask - 1)]
    if not open_cells:
        found.append([mask.bit_length() for mask in masks])
        return
    cell = min(open_cells)[1]
    digits = np.arange(size.side) if rng is None else rng.permutation(size.side)
    for digit in digits:
        bit = 1 << int(digit)
        if masks[cell] & bit:
            copy = masks.copy()
            if _place(copy, cell, bit, size):
                _search(copy, size, found, limit, rng)
                if len(found) >= limit:
                    return


def _masks(board: np.ndarray, size: Size, forbid: tuple[int, int] | None = None) -> list[int] | None:
    """Candidates left by a board's givens; `forbid` is a (cell, digit) ruled out besides. None if they contradict."""
    masks = [(1 << size.side) - 1] * size.cells
    if forbid is not None:
        masks[forbid[0]] &= ~(1 << (forbid[1] - 1))
    for cell in np.flatnonzero(board):
        bit = 1 << (int(board[cell]) - 1)
        if not masks[cell] & bit or (masks[cell] != bit and not _place(masks, int(cell), bit, size)):
            return None
    return masks


def solve(board: np.ndarray, size: Size, limit: int = 2, forbid: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Up to `limit` solutions of a board."""
    masks, found = _masks(board, size, forbid), []
    if masks is not None:
        _search(masks, size, found, limit, None)
    return [np.array(row, np.uint8) for row in found]


def dig(size: Size, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random solved grid and a minimal board for it: no given can go without losing the one solution."""
    found: list[list[int]] = []
    _search([(1 << size.side) - 1] * size.cells, size, found, 1, rng)
    solution = np.array(found[0], np.uint8)
    board = solution.copy()
    for cell in rng.permutation(size.cells):
        digit, board[cell] = int(board[cell]), 0
        if solve(board, size, limit=1, forbid=(int(cell), digit)):  # another digit fits here: the given is needed
            board[cell] = digit
    return board, solution


# --- checking, reading, writing -----------------------------------------------------------------------------------


def check(board: np.ndarray, solution: np.ndarray) -> bool:
    """Whether `solution` keeps the givens and has every digit once in every row, column and box."""
    size = SIZES[int(np.sqrt(len(board)))]
    full = set(range(1, size.side + 1))
    kept = len(solution) == len(board) and bool(np.all((board == 0) | (board == solution)))
    return kept and all({int(solution[cell]) for cell in unit} == full for unit in units(size))


def parse(text: str) -> np.ndarray:
    """Read a board from rows or from one line; '.', '_', '0' and '*' are blanks. ValueError says what is wrong."""
    symbols = [c for c in text.replace("\\n", "\n") if not c.isspace() and c not in "|-+,/"]
    bad = sorted({c for c in symbols if c not in BLANKS and not ("1" <= c <= "9")})
    if bad:
        raise ValueError(f"a board holds digits and '.' for blanks, not {' '.join(bad)!r}")
    sides = {size.cells: side for side, size in SIZES.items()}
    if len(symbols) not in sides:
        raise ValueError(f"a board has 16, 36 or 81 cells; this one has {len(symbols)}")
    board = np.array([0 if c in BLANKS else int(c) for c in symbols], np.uint8)
    if board.max() > sides[len(symbols)]:
        raise ValueError(f"a board of {len(symbols)} cells holds digits up to {sides[len(symbols)]}, not {board.max()}")
    return board


def render(board: np.ndarray) -> str:
    """Rows of digits, '.' for a blank: the text of prompts and answers."""
    side = int(np.sqrt(len(board)))
    return "\n".join("".join(str(int(d)) if d else "." for d in row) for row in board.reshape(side, side))


# --- symmetries, the split, and an endless stream of batches ------------------------------------------------------


def _line_orders(rng: np.random.Generator, count: int, bands: int, lines: int) -> np.ndarray:
    """Orders of bands*lines lines that keep bands together: [count, bands*lines]."""
    band = rng.random((count, bands)).argsort(1)  # (N, bands)
    line = rng.random((count, bands, lines)).argsort(2)  # (N, bands, lines)
    return (band[:, :, None] * lines + line).reshape(count, bands * lines)


def shuffle(rng: np.random.Generator, boards: np.ndarray, solutions: np.ndarray, size: Size) -> tuple[np.ndarray, ...]:
    """Relabel digits and permute rows within bands, bands, columns within stacks, and stacks: [N, cells] each."""
    count, n = len(boards), size.side
    rows = _line_orders(rng, count, n // size.box_rows, size.box_rows)
    columns = _line_orders(rng, count, n // size.box_cols, size.box_cols)
    cells = (rows[:, :, None] * n + columns[:, None, :]).reshape(count, -1)
    digits = np.concatenate([np.zeros((count, 1), int), rng.random((count, n)).argsort(1) + 1], axis=1)
    moved = [np.take_along_axis(x, cells, 1).astype(int) for x in (boards, solutions)]
    return tuple(np.take_along_axis(digits, x, 1).astype(np.uint8) for x in moved)


def fill_in(rng: np.random.Generator, boards: np.ndarray, solutions: np.ndarray, givens: np.ndarray) -> np.ndarray:
    """Copy digits of the solution into random blanks until a board has `givens` [N]; never fewer than it had."""
    order = rng.random(boards.shape) - 2.0 * (boards > 0)  # a board's own givens come first
    rank = order.argsort(1).argsort(1)
    keep = rank < np.maximum(givens, (boards > 0).sum(1))[:, None]
    return np.where(keep, solutions, 0).astype(np.uint8)


def digest(grids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of digits [N, cells]: the same on every machine and in every process."""
    state = np.full(len(grids), 0x9E3779B97F4A7C15, np.uint64)
    for column in grids.T:
        state = (state ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(29)
    return state


def held_out(boards: np.ndarray, solutions: np.ndarray, size: Size, one_in: int = 50) -> np.ndarray:
    """Which examples training never sees. By solved grid, so that every board of such a grid is new; 4x4 has only 288
    grids, too few to spare any, so there it goes by board."""
    return digest(boards if size.side == 4 else solutions) % np.uint64(one_in) == 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """An endless stream of boards of one size, shuffled from a pool of minimal ones."""

    size: Size
    boards: np.ndarray  # (pool, cells) minimal
    solutions: np.ndarray  # (pool, cells)
    givens: tuple[int, int]  # the range that the number of givens is drawn from, both ends included

    def batch(self, rng: np.random.Generator, count: int, *, test: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`count` boards and solutions [count, cells], all from the training part or all from the held-out one."""
        parts, have = [], 0
        while have < count:
            draw = rng.integers(len(self.boards), size=(count - have) * (60 if test else 1) + 8)
            boards, solutions = shuffle(rng, self.boards[draw], self.solutions[draw], self.size)
            wanted = rng.integers(self.givens[0], self.givens[1] + 1, len(draw))
            boards = fill_in(rng, boards, solutions, wanted)
            keep = held_out(boards, solutions, self.size) == test
            parts.append((boards[keep], solutions[keep]))
            have += int(keep.sum())
        boards, solutions = (np.concatenate(x)[:count] for x in zip(*parts, strict=True))
        return boards, solutions


GIVENS = {4: (4, 10), 6: (8, 22), 9: (22, 50)}  # a dug board that needs more than the number drawn keeps what it needs
POOL = {4: 2000, 6: 6000, 9: 2000}


def source(side: int, seed: int = 0, pool: int | None = None) -> Source:
    """Dig the pool for one size: about 10 s for 4x4 and a minute for 6x6."""
    size, rng = SIZES[side], np.random.default_rng([seed, side])
    dug = [dig(size, rng) for _ in range(pool or POOL[side])]
    boards, solutions = (np.stack(x) for x in zip(*dug, strict=True))
    return Source(size=size, boards=boards, solutions=solutions, givens=GIVENS[side])
