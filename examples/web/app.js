// The page: a board to edit, the loop's events drawn, the answer checked. How the model is run is in loop.js.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { generate } from "./loop.js";
import { EXAMPLES, SIZES, conflicts, mistakes, parse, rows, solutions } from "./sudoku.js";
import { Tokenizer } from "./tokenizer.js";

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const STATES = ["changing", "guess", "accepted", "settled"]; // and "held"
const FREE = -1;

let nano; // { model, tokenizer, template }, once loaded
let size = SIZES[6];
let inputs = []; // the board's cells
let drafts = []; // of the newest answer, each with its `states`
let wrong = new Set(); // cells of it
let stopped = null; // while running: a function that ends it

// ---- The model ------------------------------------------------------------------------------------------------

async function load() {
  const get = async (name) => {
    const answer = await fetch(new URL(`nano/${name}`, import.meta.url));
    if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
    return answer;
  };
  const json = async (name) => (await get(name)).json();
  const bytes = async (name) => new Uint8Array(await (await get(name)).arrayBuffer());

  // One thread: more need shared memory, which browsers grant only to pages served with special headers.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };

  const about = await json("dgemma-onnx.json");
  const externalData = await Promise.all(about.weights.map(async (path) => ({ path, data: await bytes(path) })));
  const session = async (name) => ort.InferenceSession.create(await bytes(about.graphs[name]), { externalData });
  const model = { ort, about, encode: await session("encode"), denoise: await session("denoise") };
  return { model, tokenizer: new Tokenizer(await json("tokenizer.json")), template: await json("prompt.json") };
}

/** Token ids of a board as the model reads it: between the chat template's markers, which build.py wrote down. */
function promptIds(cells) {
  return [...nano.template.before, ...nano.tokenizer.encode(rows(cells)), ...nano.template.after];
}

/**
 * What is known of the answer, position by position: the givens, the line breaks between rows, the end of the turn.
 * They stand in the canvas from the first pass on; the cells between them are the model's.
 */
function known(cells) {
  const text = [...rows(cells)];
  return [...text.map((one) => (one === "." ? FREE : nano.tokenizer.encode(one)[0])), nano.template.end];
}

/** Positions of the board's cells in the answer: rows of digits with a line break after each. */
const places = () => inputs.map((_, i) => Math.floor(i / size.side) * (size.side + 1) + (i % size.side));

// ---- Solving --------------------------------------------------------------------------------------------------

async function solve() {
  const cells = board();
  const options = {
    seed: BigInt($("seed").value),
    steps: $("steps").valueAsNumber,
    maxNewTokens: nano.model.about.canvas_length,
    held: known(cells),
  };
  const prompt = promptIds(cells);
  const times = { prefill: 0, passes: 0 };
  let stop = false;
  let wake = () => {};
  stopped = () => {
    stop = true;
    wake();
  };
  forget();
  $("prompt").textContent = prompt.join(" ");
  $("solve").textContent = "Stop";
  say("Denoising …");
  $("canvas").scrollIntoView({ block: "nearest" }); // on a narrow screen it is below the board
  let answer = null;
  try {
    for await (const event of generate(nano.model, prompt, options)) {
      if (stop) break;
      if (event.kind === "prefill") times.prefill = event.ms;
      if (event.kind === "commit") answer = event.tokens;
      if (event.kind !== "draft") continue;
      times.passes += event.ms;
      add(event);
      const wait = Number($("pause").value); // without one, let the page be drawn all the same
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, wait);
      });
    }
  } finally {
    stopped = null;
    $("solve").textContent = "Solve";
  }
  if (stop) say("Stopped.");
  else check(cells, answer, times);
}

function check(cells, answer, { prefill, passes }) {
  $("answer").textContent = answer.join(" ");
  wrong = mistakes(cells, places().map((place) => nano.tokenizer.decode([answer[place]])), size);
  show(drafts.length);
  const time = `${count(drafts.length, "pass", "passes")} in ${passes.toFixed(0)} ms, ` +
    `${(passes / drafts.length).toFixed(1)} ms each; reading the board took ${prefill.toFixed(0)} ms.`;
  if (!wrong.size) say(`Solved. ${time}`);
  else say(`Not solved: ${count(wrong.size, "cell is", "cells are")} wrong, marked ✗. ${time}`, true);
}

const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// ---- The canvas -----------------------------------------------------------------------------------------------

/** Take a pass into the history and show it. */
function add(draft) {
  const before = drafts.at(-1)?.tokens ?? [];
  const state = (i) => STATES[2 * draft.accepted[i] + (draft.tokens[i] === before[i])];
  const states = draft.held.map((held, i) => (held ? "held" : state(i)));
  drafts.push({ ...draft, states });
  show(drafts.length);
}

/** Forget the newest answer. */
function forget() {
  drafts = [];
  wrong = new Set();
  $("answer").textContent = "";
  show(0);
}

/** Draw one pass, from 1; 0 is the empty canvas. */
function show(pass) {
  const slider = $("pass");
  Object.assign(slider, { max: Math.max(drafts.length, 1), value: Math.max(pass, 1), disabled: drafts.length < 2 });
  const draft = drafts[pass - 1];
  $("count").textContent = draft ? `${pass} of ${drafts.length}` : "–";
  slider.setAttribute("aria-valuetext", $("count").textContent);

  const last = pass === drafts.length;
  const cells = places();
  grid($("canvas"), (cell) => {
    const one = token(draft, cells[cell]);
    one.classList.toggle("wrong", last && wrong.has(cell));
    return one;
  });
  const others = (draft?.tokens ?? []).map((_, i) => i).filter((i) => !cells.includes(i));
  $("rest").replaceChildren(...others.map((i) => token(draft, i)));
  $("canvas").ariaLabel = draft ? spoken(draft, cells, pass) : "The canvas is empty";
}

/** One position of the canvas as a cell. */
function token(draft, i) {
  const cell = document.createElement("span");
  cell.className = "cell";
  if (!draft) return cell;
  const id = draft.tokens[i];
  const name = nano.tokenizer.name(id);
  const ends = nano.model.about.tokens.eos.includes(id);
  cell.textContent = ends ? "■" : name === "line break" ? "↵" : name.length === 1 ? name : "·";
  cell.classList.add(draft.states[i]);
  cell.title = `${name}, ${draft.states[i]}, ${draft.entropy[i].toFixed(3)} nats`;
  return cell;
}

function spoken(draft, cells, pass) {
  const states = [...STATES, "held"].map((state) => [cells.filter((i) => draft.states[i] === state).length, state]);
  const digits = cells.map((i) => nano.tokenizer.name(draft.tokens[i])).join(" ");
  return `Pass ${pass}: ${states.filter(([n]) => n).map((one) => one.join(" ")).join(", ")}. ${digits}`;
}

// ---- The board ------------------------------------------------------------------------------------------------

/** Fill an element with a board's rows of cells. */
function grid(element, make) {
  const { side } = size;
  element.replaceChildren(...Array.from({ length: side }, (_, r) => {
    const row = document.createElement("div");
    row.className = "row";
    row.setAttribute("role", "row");
    row.classList.toggle("below", (r + 1) % size.rows === 0 && r + 1 < side);
    row.append(...Array.from({ length: side }, (_, c) => {
      const cell = make(r * side + c);
      cell.classList.toggle("right", (c + 1) % size.columns === 0 && c + 1 < side);
      return cell;
    }));
    return row;
  }));
}

/** The board's cells: a string of digits and dots. */
const board = () => inputs.map((input) => input.value || ".").join("");

function setBoard(cells) {
  size = SIZES[Math.sqrt(cells.length)];
  inputs = [];
  grid($("board"), (i) => {
    const cell = document.createElement("div");
    cell.className = "cell";
    cell.setAttribute("role", "gridcell");
    const input = document.createElement("input");
    Object.assign(input, { value: cells[i] === "." ? "" : cells[i], inputMode: "numeric", autocomplete: "off" });
    input.setAttribute("aria-label", `row ${Math.floor(i / size.side) + 1}, column ${(i % size.side) + 1}`);
    input.tabIndex = i ? -1 : 0; // one stop for the Tab key; arrows move inside
    inputs.push(input);
    cell.append(input);
    return cell;
  });
  edited();
}

/** The board has changed: what stands about it is out of date. */
function edited() {
  stopped?.();
  forget();
  const cells = board();
  $("example").value = cells; // none, if it is no example any more
  const bad = conflicts(cells, size);
  inputs.forEach((input, i) => {
    input.parentElement.classList.toggle("conflict", bad.has(i));
    input.setAttribute("aria-invalid", bad.has(i));
  });
  const found = solutions(cells, size);
  let advice = ["This board has no solution.", "", "This board has more than one solution."][found];
  if (bad.size) advice = "A digit stands twice in a row, column or box.";
  $("advice").textContent = advice && `${advice} nano answers anyway.`;
  $("advice").classList.toggle("bad", found === 0);
  if (nano) say("Ready.");
}

function focused(event) {
  for (const input of inputs) input.tabIndex = input === event.target ? 0 : -1;
  event.target.select();
}

function keyed(event) {
  const at = inputs.indexOf(event.target);
  const { side } = size;
  const column = at % side;
  const moves = {
    ArrowLeft: column ? at - 1 : at,
    ArrowRight: column < side - 1 ? at + 1 : at,
    ArrowUp: at - side,
    ArrowDown: at + side,
    Home: at - column,
    End: at - column + side - 1,
  };
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in moves) inputs[moves[event.key]]?.focus();
  else if (event.key === "Backspace" && !inputs[at].value) inputs[at - 1]?.focus();
  else return;
  event.preventDefault();
}

function typed(event) {
  const at = inputs.indexOf(event.target);
  const last = inputs[at].value.slice(-1);
  const digit = last >= "1" && last <= String(size.side);
  inputs[at].value = digit ? last : "";
  edited();
  if (digit || [".", "0", " "].includes(last)) inputs[at + 1]?.focus();
}

function pasted(event) {
  const cells = parse(event.clipboardData.getData("text"));
  event.preventDefault();
  if (cells) setBoard(cells);
  else $("advice").textContent = "What was pasted is not a board: 16 or 36 digits, with dots for blanks.";
}

// ---- The page -------------------------------------------------------------------------------------------------

for (const [name, cells] of Object.entries(EXAMPLES)) $("example").append(new Option(name, cells));
for (const side of [6, 4]) $("example").append(new Option(`${side}×${side}, empty`, ".".repeat(side * side)));
if (still) $("pause").value = "0";
setBoard($("example").value);

$("example").addEventListener("change", () => setBoard($("example").value));
$("clear").addEventListener("click", () => setBoard(".".repeat(inputs.length)));
$("board").addEventListener("keydown", keyed);
$("board").addEventListener("input", typed);
$("board").addEventListener("paste", pasted);
$("board").addEventListener("focusin", focused);
$("pass").addEventListener("input", () => show($("pass").valueAsNumber));
$("seed").addEventListener("input", () => {
  const good = /^\d{1,20}$/.test($("seed").value) && BigInt($("seed").value) < 1n << 64n;
  $("seed").setCustomValidity(good ? "" : "An integer from 0 to 2^64 − 1.");
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (stopped) stopped();
  else if (nano) solve().catch(failed);
});

function failed(error) {
  console.error(error);
  say(`It failed: ${error.message}`, true);
}

try {
  nano = await load();
  $("steps").value = nano.model.about.sampler.steps;
  $("solve").disabled = false;
  say("Ready.");
} catch (error) {
  failed(error);
}
