/**
 * Loads the repo and generates, away from the page, so that neither stops it from answering.
 *
 * @typedef {'wasm' | 'webgpu'} Device
 * @typedef {{ device: Device, dtype: string, cache: string | null }} Settings
 * @typedef {{ threads: number | undefined, max_new_tokens: number }} Loaded
 * @typedef {{ image: Blob, prompt: string | null, num_beams: number }} Question
 * @typedef {{ text: string, tokens: number }} Token  The text so far, and of how many tokens it is.
 * @typedef {{ texts: string[], first_token_ms: number | null, total_ms: number, tokens: number, stopped: boolean }} Answer
 *     Of all beams, the best one first.
 * @typedef {{ load: Settings } | { generate: Question } | { stop: true }} Request
 * @typedef {{ bytes: number } | { loaded: Loaded } | { token: Token } | { answer: Answer } | { error: string }} Reply
 */

import { RawImage, env } from './transformers/transformers.min.js';
import { VisionLanguageModel } from './vlm-export/index.js';

const BASE = new URL('./', import.meta.url);
/** The settings of ONNX Runtime, all of which are there once transformers.js is imported. */
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);
const RUNTIME = new URL('onnxruntime/ort-wasm-simd-threaded.asyncify', BASE).href;

/** @type {VisionLanguageModel} */
let model;
let stopping = new AbortController();

/** @type {(reply: Reply) => void} */
const reply = (value) => postMessage(value);

/**
 * Counts what arrives, the runtime's files included, of which transformers.js does not tell.
 * @param {RequestInfo | URL} url
 * @param {RequestInit} [options]
 */
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

/**
 * Caches are shared by all pages of a server: ours is named after the page's address and the repo's content.
 * @param {string} cache
 */
async function keepOneCache(cache) {
    const ours = `vlm-export ${BASE.pathname} `;
    for (const name of await caches.keys()) {
        if (name.startsWith(ours) && name !== ours + cache) {
            await caches.delete(name);
        }
    }
    env.cacheKey = ours + cache;
}

/** @param {Settings} settings */
async function load({ device, dtype, cache }) {
    // As from a Hub: of a local model, the size of a file is asked for with a request that nobody reads to its end, and six
    // of those block the server for this page.
    env.allowLocalModels = false;
    env.remoteHost = BASE.href;
    env.remotePathTemplate = '{model}/';
    env.fetch = countedFetch;
    env.useBrowserCache = cache !== null && 'caches' in self;
    if (cache !== null && env.useBrowserCache) {
        await keepOneCache(cache);
    }
    onnx.wasm.wasmPaths = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };
    model = await VisionLanguageModel.from_pretrained('model', { device, dtype });
    const { max_new_tokens } = /** @type {{ max_new_tokens: number }} */ (model.generation_config);
    reply({ loaded: { threads: onnx.wasm.numThreads, max_new_tokens } });
}

/** @param {Question} question */
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

/** @type {(request: Request) => Promise<void>} */
async function act(request) {
    if ('load' in request) {
        await load(request.load);
    } else if ('generate' in request) {
        await generate(request.generate);
    } else {
        stopping.abort();
    }
}

/** @param {MessageEvent<Request>} event */
self.onmessage = async ({ data }) => {
    try {
        await act(data);
    } catch (error) {
        const reason = /** @type {Partial<Error> | undefined} */ (error)?.message ?? error;
        reply({ error: String(reason) });
    }
};
