/**
 * Files of the model and of the runtime, as they come: told, counted and kept.
 *
 * @typedef {import('./worker.js').Part} Part
 * @typedef {import('./worker.js').Settings} Settings
 */

import { reply } from './requests.js';

export const BASE = new URL('./', import.meta.url);
const RUNTIME = new URL('onnxruntime/ort-wasm-simd-threaded.asyncify', BASE).href;
/** Where the runtime lies. */
export const RUNTIME_FILES = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };

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
export async function counted_fetch(url, options) {
    return counted(part_of(String(url)), await fetch(url, options));
}

/** What transformers.js keeps, in the cache of its part: the runtime stays when the model is another. */
export class Kept {
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
