/**
 * Greedy tokens of a GGUF file in llama.cpp, as `four_bits.py` asks for them on stdin; prints one JSON object,
 * `{load_ms, runs: [{ms, tokens}]}`: after how long each token was there. Nothing is downloaded or built.
 *
 * @typedef {object} Request
 * @property {string} gguf
 * @property {number[]} ids
 * @property {number} steps tokens after the first
 * @property {number} repeats
 * @property {number} threads
 * @property {'wall' | 'processor'} clock
 */

import { text } from 'node:stream/consumers';

/** @type {Request} */
const request = JSON.parse(await text(process.stdin));
// Not installed where scripts are type-checked.
const { getLlama } = await import(/** @type {string} */ ('node-llama-cpp'));

const started = performance.now();
const llama = await getLlama({ gpu: false, build: 'never', skipDownload: true, maxThreads: request.threads });
const model = await llama.loadModel({ modelPath: request.gguf });
const size = request.ids.length + request.steps + 2;
const context = await model.createContext({ contextSize: size, batchSize: size, threads: request.threads });
const sequence = context.getSequence();
const load_ms = performance.now() - started;

/** Milliseconds, of the whole process if they are the processor's. */
function now() {
    const { user, system } = process.cpuUsage();
    return request.clock === 'wall' ? performance.now() : (user + system) / 1000;
}

async function generate() {
    await sequence.clearHistory();
    const begun = now();
    const ms = [];
    const tokens = [];
    for await (const token of sequence.evaluate(request.ids, { temperature: 0, yieldEogToken: true })) {
        tokens.push(token);
        ms.push(now() - begun);
        if (tokens.length > request.steps) break;
    }
    if (tokens.length <= request.steps) throw new Error(`the text ended after ${tokens.length} tokens`);
    return { ms, tokens };
}

await generate();
const runs = [];
for (let run = 0; run < request.repeats; run++) runs.push(await generate());
process.stdout.write(JSON.stringify({ load_ms, runs }), () => process.exit(0));
