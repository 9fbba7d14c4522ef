// Boards: strings of digits and dots, read, written and checked. 4x4 in boxes of 2x2, 6x6 in boxes of 2x3.

export const SIZES = { 4: { side: 4, rows: 2, columns: 2 }, 6: { side: 6, rows: 2, columns: 3 } };

/** Boards with one solution each, by what they are called. */
export const EXAMPLES = {
  "6×6, 16 givens": "3..2..2..5..5.216...1.5....63..6.425",
  "6×6, 10 givens": ".5..3.2.3.......6.1......2.5....4..3",
  "6×6, one that nano gets wrong": ".1...5.3.......5....26.4421.........",
  "4×4, 4 givens": ".3.1.2.........4",
};

/** Cells of every row, column and box. */
export function units({ side, rows, columns }) {
  const cells = Array.from({ length: side * side }, (_, i) => i);
  const box = (i) => Math.floor(Math.floor(i / side) / rows) * rows + Math.floor((i % side) / columns);
  const places = [(i) => Math.floor(i / side), (i) => i % side, box];
  return places.flatMap((place) => Array.from({ length: side }, (_, n) => cells.filter((i) => place(i) === n)));
}

/** A board in one line or in rows → cells, or null if it is none; ".", "0", "_" and "*" are blanks. */
export function parse(text) {
  const cells = text.replace(/[\s|,/+-]/g, "").replace(/[0_*]/g, ".");
  const side = Math.sqrt(cells.length);
  return side in SIZES && /^[.1-9]*$/.test(cells) && !/[1-9]/.test(cells.replace(allowed(side), "")) ? cells : null;
}

const allowed = (side) => new RegExp(`[1-${side}]`, "g");

/** Rows of digits, a dot for a blank: how prompts and answers are written. */
export function rows(cells) {
  const side = Math.sqrt(cells.length);
  return Array.from({ length: side }, (_, row) => cells.slice(row * side, (row + 1) * side)).join("\n");
}

/** Cells whose digit stands twice in a row, column or box. */
export function conflicts(cells, size) {
  const bad = new Set();
  for (const unit of units(size)) {
    for (const i of unit) if (cells[i] !== "." && unit.some((j) => j !== i && cells[j] === cells[i])) bad.add(i);
  }
  return bad;
}

/** How many solutions a board has, counted up to two. */
export function solutions(cells, size) {
  const all = units(size);
  const digits = Array.from({ length: size.side }, (_, i) => String(i + 1));
  const candidates = (board, i) => {
    const seen = all.filter((unit) => unit.includes(i)).flatMap((unit) => unit.map((j) => board[j]));
    return digits.filter((digit) => !seen.includes(digit));
  };
  const search = (board) => {
    let best = null;
    for (let i = 0; i < board.length; i++) {
      if (board[i] !== ".") continue;
      const open = candidates(board, i);
      if (!best || open.length < best.open.length) best = { i, open };
    }
    if (!best) return 1;
    let found = 0;
    for (const digit of best.open) {
      found += search([...board.slice(0, best.i), digit, ...board.slice(best.i + 1)]);
      if (found > 1) return 2;
    }
    return found;
  };
  return conflicts(cells, size).size ? 0 : search([...cells]);
}

/** Cells in which an answer, a text or a list of texts, is wrong: not a digit of the board, another than the given, or twice in a unit. */
export function mistakes(board, answer, size) {
  const filled = [...board].map((_, i) => (allowed(size.side).test(answer[i] ?? "") ? answer[i] : "."));
  const bad = conflicts(filled.join(""), size);
  filled.forEach((digit, i) => {
    if (digit === "." || (board[i] !== "." && board[i] !== digit)) bad.add(i);
  });
  return bad;
}
