/**
 * Makes transformers.js in Node run on onnxruntime-web's WASM build:
 *
 *     node --import ./onnxruntime-web.mjs caption.mjs
 *
 * transformers.js takes the ONNX Runtime that it finds under this symbol. All else of it is its Node build: images are
 * read by sharp, not by a canvas. Node gets the build without WebGPU, as old Safaris do; the one of other browsers,
 * made interruptible by asyncify, takes Node 20 half a minute and 2 GB to compile.
 */

import { readFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { basename } from 'node:path';

import * as ort from 'onnxruntime-web';

// Any prefix: without one, transformers.js sets a CDN's.
ort.env.wasm.wasmPaths = new URL('.', import.meta.resolve('onnxruntime-web')).href;
// What it takes by itself in a browser.
ort.env.wasm.numThreads = Math.min(4, Math.ceil(availableParallelism() / 2));

/**
 * The chunks of external data beside a graph.
 * @param {string} graph a path
 * @returns {Promise<{ path: string, data: Uint8Array }[]>}
 */
async function externalData(graph) {
    const chunks = [];
    for (let index = 0; ; index++) {
        const path = `${graph}_data${index ? `_${index}` : ''}`;
        try {
            chunks.push({ path: basename(path), data: await readFile(path) });
        } catch (error) {
            if (/** @type {NodeJS.ErrnoException} */ (error).code === 'ENOENT') return chunks;
            throw error;
        }
    }
}

const InferenceSession = {
    /**
     * In Node, transformers.js leaves external data to ONNX Runtime; its WASM build does not look for files. A graph that
     * is given as bytes, by which images are resized, has none.
     * @type {(graph: string | Uint8Array, options: ort.InferenceSession.SessionOptions) => Promise<ort.InferenceSession>}
     */
    async create(graph, options) {
        if (typeof graph !== 'string') {
            return ort.InferenceSession.create(graph, options);
        }
        return ort.InferenceSession.create(graph, { ...options, externalData: await externalData(graph) });
    },
};
/** @type {Record<symbol, unknown>} */ (globalThis)[Symbol.for('onnxruntime')] = { ...ort, InferenceSession };
