// The host loop of DiffusionGemma: prompt in, events out. core/engine.py in JavaScript, over two ONNX graphs.
//
//   read the prompt ──▶ denoise a canvas ──▶ commit its argmax ──▶ encode it ──▶ next canvas …
//      (encode)           (≤ steps passes)      (cut at the end)     (never the last)
//
// The graphs do the arithmetic: `encode` reads tokens into the cache, `denoise` is one whole pass over a canvas, with
// sampling and acceptance inside. What is left for a host is here: random numbers, the temperature schedule, the stop
// test, and what is committed. dgemma-onnx.json, beside the graphs, names the inputs and holds every number used.

import { stepNoise } from "./random.js";

const VERSION = 3; // of dgemma-onnx.json: graphs of version 2 have no input `held`
const FREE = -1;

/**
 * Write until an end-of-sequence token or the token budget.
 *
 * model: { ort, about, encode, denoise }: onnxruntime-web, the parsed dgemma-onnx.json, and the two sessions.
 * prompt: token ids. options: { seed: BigInt, maxNewTokens, held, and what is to differ from about.sampler }; an empty
 * `eos` never ends early. `held` are tokens that positions of the answer keep, from its first on: −1, and all beyond its
 * end, is free.
 * Yields { kind: "prefill", ms }, { kind: "draft", canvas, step, tokens, accepted, entropy, held, ms } after each pass,
 * and { kind: "commit", canvas, tokens } for each canvas; returns "stop" or "length". `ms` is the time inside the
 * runtime. A canvas that is all held takes no pass, and has no draft.
 */
export async function* generate(model, prompt, options) {
  const { about } = model;
  if (about.version !== VERSION) {
    throw new Error(`dgemma-onnx.json is of version ${about.version}, this loop reads ${VERSION}: export again`);
  }
  const sampler = { ...about.sampler, eos: about.tokens.eos, held: [], ...options };
  const length = about.canvas_length;
  const budget = Math.min(options.maxNewTokens, about.max_positions - prompt.length);

  const began = performance.now();
  let cache = await encode(model, emptyCache(model), prompt);
  yield { kind: "prefill", ms: performance.now() - began };

  for (let canvas = 0; ; canvas++) {
    const left = budget - canvas * length; // tokens that may still be written
    const held = Array.from({ length }, (_, i) => sampler.held[canvas * length + i] ?? FREE);
    const settled = held.slice(0, left).every((token) => token !== FREE);
    const argmax = settled ? held : yield* denoise(model, cache, sampler, canvas, held);
    const end = argmax.findIndex((token) => sampler.eos.includes(token));
    const ended = end >= 0 && end <= left;
    yield { kind: "commit", canvas, tokens: argmax.slice(0, ended ? end : left) };
    if (ended) return "stop";
    if (left <= length) return "length"; // the last canvas is never encoded: nobody would read it
    cache = await encode(model, cache, argmax);
  }
}

/** Yield a draft for each pass over one canvas; return the argmax canvas, which is what is committed. */
async function* denoise(model, cache, sampler, canvas, held) {
  const { ort, about } = model;
  const length = about.canvas_length;
  const noise = (step) => stepNoise({ seed: sampler.seed, canvas, step, length, vocabSize: about.vocab_size });

  const free = held.map((token) => token === FREE);
  const first = noise(0).tokens;
  let input = ids(ort, held.map((token, i) => (free[i] ? first[i] : token))); // a canvas begins as random tokens …
  let soft = floats(ort, new Float32Array(length * about.hidden_size), [1, length, about.hidden_size]);
  let argmax = [];
  let stable = 0; // passes in a row that left the argmax canvas as it was
  for (let step = 0; step < sampler.steps; step++) {
    const { uniforms, tokens } = noise(step + 1);
    const began = performance.now();
    const out = await model.denoise.run({
      ...cache.past,
      input_ids: input,
      position_ids: positions(ort, cache.length, length),
      soft_embedding: soft,
      temperature: floats(ort, [temperature(sampler, step)], [1, 1]),
      uniform: floats(ort, uniforms, [1, length]),
      noise: ids(ort, tokens),
      entropy_bound: floats(ort, [sampler.entropy_bound], [1]),
      held: ids(ort, held),
    });
    const ms = performance.now() - began;
    // … and what the graph accepts of its sample stays in it; everywhere else come new random ones. Nothing is
    // frozen but what is held: the next pass predicts every position again, and knows this pass's distribution by its
    // mean embedding.
    input = out.next_canvas;
    soft = out.next_soft_embedding;

    const before = argmax;
    argmax = Array.from(out.argmax.data, Number);
    stable = argmax.every((token, i) => token === before[i]) ? stable + 1 : 0;
    const accepted = Array.from(out.accepted.data, Boolean);
    const entropy = Array.from(out.entropy.data); // nats, 0 where held
    yield { kind: "draft", canvas, step, tokens: argmax, accepted, entropy, held: free.map((one) => !one), ms };
    const mean = entropy.reduce((sum, one) => sum + one, 0) / free.filter(Boolean).length;
    if (mean < sampler.confidence && stable >= sampler.stability) break;
  }
  return argmax;
}

/** Passes beyond the schedule keep its last temperature: a lower cap on passes does not heat the canvas. */
export function temperature({ t_min, t_max, schedule_steps }, step) {
  const remaining = Math.max(schedule_steps - step, 1);
  return Math.max(t_min + (t_max - t_min) * (remaining / schedule_steps), 1e-3);
}

/** Read tokens; the graph returns the whole cache, cropped where a layer's window forgets. */
async function encode(model, cache, tokens) {
  const { ort, about } = model;
  const out = await model.encode.run({
    ...cache.past,
    input_ids: ids(ort, tokens),
    position_ids: positions(ort, cache.length, tokens.length),
  });
  const past = {};
  for (const layer of about.layers) layer.past.forEach((name, i) => (past[name] = out[layer.present[i]]));
  return { past, length: cache.length + tokens.length };
}

function emptyCache({ ort, about }) {
  const past = {};
  for (const { past: names, kv_heads, head_dim } of about.layers) {
    for (const name of names) past[name] = floats(ort, [], [1, kv_heads, 0, head_dim]);
  }
  return { past, length: 0 };
}

const ids = (ort, tokens) => new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
const floats = (ort, values, shape) => new ort.Tensor("float32", Float32Array.from(values), shape);
const positions = (ort, start, length) => ids(ort, Array.from({ length }, (_, i) => start + i));
