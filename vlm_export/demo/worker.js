/**
 * Loads the repo and generates, away from the page, so that neither stops it from answering.
 *
 * @typedef {{ load: { device: string, dtype: string, cache: string | null } }
 *     | { generate: { image: Blob, prompt: string | null, num_beams: number } } | { stop: true }} Request
 * @typedef {{ bytes: number } | { loaded: { threads: number, max_new_tokens: number } }
 *     | { token: { text: string, tokens: number } } | { answer: Answer } | { error: string }} Reply
 * @typedef {{ texts: string[], first_token_ms: number, total_ms: number, tokens: number, stopped: boolean }} Answer
 *     Of all beams, the best one first.
 */

import { RawImage, env } from './transformers/transformers.min.js';
import { VisionLanguageModel } from './vlm-export/index.js';

const BASE = new URL('./', import.meta.url);
const RUNTIME = new URL('onnxruntime/ort-wasm-simd-threaded.asyncify', BASE).href;

/** @type {VisionLanguageModel} */
let model;
let stopping = new AbortController();

/** @type {(reply: Reply) => void} */
const reply = (value) => postMessage(value);

/** Counts what arrives, the runtime's files included, of which transformers.js does not tell. */
async function countedFetch(url, options) {
    const response = await fetch(url, options);
    if (!response.body) {
        return response;
    }
    const count = new TransformStream({
        transform(chunk, controller) {
            reply({ bytes: chunk.byteLength });
            controller.enqueue(chunk);
        },
    });
    return new Response(response.body.pipeThrough(count), response);
}

/** Caches are shared by all pages of a server: ours is named after the page's address and the repo's content. */
async function keepOneCache(cache) {
    const ours = `vlm-export ${BASE.pathname} `;
    for (const name of await caches.keys()) {
        if (name.startsWith(ours) && name !== ours + cache) {
            await caches.delete(name);
        }
    }
    env.cacheKey = ours + cache;
}

async function load({ device, dtype, cache }) {
    // As from a Hub: of a local model, the size of a file is asked for with a request that nobody reads to its end, and six
    // of those block the server for this page.
    env.allowLocalModels = false;
    env.remoteHost = BASE.href;
    env.remotePathTemplate = '{model}/';
    env.fetch = countedFetch;
    env.useBrowserCache = cache !== null && 'caches' in self;
    if (env.useBrowserCache) {
        await keepOneCache(cache);
    }
    env.backends.onnx.wasm.wasmPaths = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };
    model = await VisionLanguageModel.from_pretrained('model', { device, dtype });
    const { max_new_tokens } = /** @type {{ max_new_tokens: number }} */ (model.generation_config);
    reply({ loaded: { threads: env.backends.onnx.wasm.numThreads, max_new_tokens } });
}

async function generate({ image, prompt, num_beams }) {
    stopping = new AbortController();
    const beams = await model.generate({
        image: await RawImage.fromBlob(image),
        ...(prompt !== null && { prompt }),
        num_beams,
        num_return_sequences: num_beams,
        signal: stopping.signal,
        on_token: ({ text, tokens }) => reply({ token: { text, tokens } }),
    });
    const texts = beams.map(({ text }) => text);
    reply({ answer: { texts, ...beams.timings, stopped: beams[0].finish_reason === 'cancelled' } });
}

const ACTIONS = { load, generate, stop: () => stopping.abort() };

/** @param {MessageEvent<Request>} event */
self.onmessage = async ({ data }) => {
    const [[name, value]] = Object.entries(data);
    try {
        await ACTIONS[name](value);
    } catch (error) {
        reply({ error: String(error?.message ?? error) });
    }
};
