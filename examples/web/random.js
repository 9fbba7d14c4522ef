// Random numbers of one denoising pass: core/random.py in JavaScript, bit for bit.
//
// Philox 4x64 with 10 rounds (Salmon et al. 2011), as NumPy has it: the counter starts at 1 and the key is
// (seed, canvas << 32 | step). Randomness is data here, so the same seed gives the same tokens as in Python.

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** Four 64-bit words of the stream `key`, a pair of BigInts, at block `counter`. */
function block(counter, [k0, k1]) {
  let [a, b, c, d] = [counter, 0n, 0n, 0n];
  for (let round = 0; round < 10; round++) {
    const p0 = MULTIPLIERS[0] * a;
    const p1 = MULTIPLIERS[1] * c;
    [a, b, c, d] = [(p1 >> 64n) ^ b ^ k0, p1 & MASK, (p0 >> 64n) ^ d ^ k1, p0 & MASK];
    k0 = (k0 + WEYL[0]) & MASK;
    k1 = (k1 + WEYL[1]) & MASK;
  }
  return [a, b, c, d];
}

/**
 * Step 0's tokens are the canvas that denoising starts from; step n's follow the n-th pass.
 *
 * seed: BigInt from 0 to 2^64 - 1. Returns uniforms, Float32Array [length] in [0, 1), and tokens, BigInt64Array
 * [length] in [0, vocabSize).
 */
export function stepNoise({ seed, canvas, step, length, vocabSize }) {
  const key = [seed, (BigInt(canvas) << 32n) | BigInt(step)];
  const words = [];
  for (let counter = 1n; words.length < 2 * length; counter++) words.push(...block(counter, key));
  const uniforms = Float32Array.from(words.slice(0, length), (word) => Number(word >> 40n) * 2 ** -24);
  const tokens = words.slice(length, 2 * length).map((word) => ((word >> 32n) * BigInt(vocabSize)) >> 32n);
  return { uniforms, tokens: BigInt64Array.from(tokens) };
}
