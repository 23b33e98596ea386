/**
 * Loads the repo and generates, away from the page, so that neither stops it from answering.
 *
 * @typedef {'wasm' | 'webgpu'} Device
 * @typedef {'model' | 'runtime'} Part  Of what is downloaded.
 * @typedef {{ device: Device, dtype: string, caches: Record<Part, string | null> }} Settings  By part the name of what
 *     is kept of it, another for other content; null where nothing is.
 * @typedef {{ threads: number | undefined, max_new_tokens: number }} Loaded
 * @typedef {{ image: Blob, prompt: string | null, num_beams: number }} Question
 * @typedef {{ text: string, tokens: number }} Token  The text so far, and of how many tokens it is.
 * @typedef {{
 *     sequences: { text: string, score: number | null }[], first_token_ms: number | null, total_ms: number,
 *     tokens: number, stopped: boolean,
 * }} Answer  Of all beams, the best one first.
 * @typedef {{ load: Settings } | { generate: Question } | { stop: true }} Request
 * @typedef {{ part: Part, bytes: number } | { loaded: Loaded } | { token: Token } | { answer: Answer } | { error: string }} Reply
 */

import { RawImage, env } from './transformers/transformers.min.js';
import { VisionLanguageModel, load_from } from './vlm-export/index.js';

const BASE = new URL('./', import.meta.url);
/** The settings of ONNX Runtime, all of which are there once transformers.js is imported. */
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);
const RUNTIME = new URL('onnxruntime/ort-wasm-simd-threaded.asyncify', BASE).href;

/** @type {VisionLanguageModel} */
let model;
let stopping = new AbortController();

/** @type {(reply: Reply) => void} */
const reply = (value) => postMessage(value);

/** @type {(address: string) => Part} */
const part_of = (address) => (address.startsWith(RUNTIME) ? 'runtime' : 'model');

/**
 * Tells how much of a response has come, the runtime's included, of which transformers.js does not tell.
 * @param {Part} part
 * @param {Response} response
 */
function counted(part, response) {
    if (!response.body) {
        return response;
    }
    const count = new TransformStream({
        transform(chunk, controller) {
            reply({ part, bytes: chunk.byteLength });
            controller.enqueue(chunk);
        },
    });
    return new Response(response.body.pipeThrough(count), response);
}

/**
 * @param {RequestInfo | URL} url
 * @param {RequestInit} [options]
 */
async function counted_fetch(url, options) {
    return counted(part_of(String(url)), await fetch(url, options));
}

/** What transformers.js keeps, in the cache of its part: the runtime stays when the model is another. */
class Kept {
    /** @type {Partial<Record<Part, Cache>>} */
    #caches = {};

    /** @param {Settings['caches']} names */
    async open(names) {
        for (const part of /** @type {Part[]} */ (Object.keys(names))) {
            const name = names[part];
            if (name !== null) {
                this.#caches[part] = await only_cache(part, name);
            }
        }
        return this;
    }

    /** @param {string} address */
    async match(address) {
        const found = await this.#caches[part_of(address)]?.match(address);
        return found && counted(part_of(address), found);
    }

    /**
     * @param {string} address
     * @param {Response} response
     */
    async put(address, response) {
        await this.#caches[part_of(address)]?.put(address, response);
    }
}

/**
 * Caches are shared by all pages of a server: ours are named after the page's address, the part and its content.
 * @param {Part} part
 * @param {string} content
 */
async function only_cache(part, content) {
    const ours = `vlm-export ${BASE.pathname} ${part} `;
    for (const name of await caches.keys()) {
        if (name.startsWith(ours) && name !== ours + content) {
            await caches.delete(name);
        }
    }
    return await caches.open(ours + content);
}

/** @param {Settings} settings */
async function load({ device, dtype, caches: names }) {
    load_from({ models: BASE, runtime: { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` } });
    env.fetch = counted_fetch;
    env.useBrowserCache = false;
    env.useCustomCache = 'caches' in self;
    if (env.useCustomCache) {
        env.customCache = await new Kept().open(names);
    }
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
    const sequences = beams.map(({ text, score }) => ({ text, score }));
    reply({ answer: { sequences, ...beams.timings, stopped: beams[0].finish_reason === 'cancelled' } });
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
