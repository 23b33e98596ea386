/**
 * The same as `worker.js` for a repo that is one file: ONNX Runtime alone runs it, a whole caption at a time.
 *
 * @typedef {import('./worker.js').Settings} Settings
 * @typedef {import('./worker.js').Question} Question
 */

import { BASE, Kept, RUNTIME_FILES, counted_fetch } from './downloads.js';
import * as ort from './onnxruntime/ort.webgpu.min.mjs';
import { reply, serve } from './requests.js';
import { SUFFIXES } from './vlm-export/src/contract.js';

/** @type {import('onnxruntime-web').InferenceSession} */
let session;

/** @param {Settings} settings */
async function load({ device, dtype, caches: names }) {
    const kept = 'caches' in self ? await new Kept().open(names) : null;
    /** @param {string} address */
    async function read(address) {
        const found = (await kept?.match(address)) ?? (await fetched(address, kept));
        return new Uint8Array(await found.arrayBuffer());
    }
    ort.env.wasm.wasmPaths = RUNTIME_FILES;
    ort.env.wasm.wasmBinary = await read(RUNTIME_FILES.wasm);
    const suffix = SUFFIXES[/** @type {keyof typeof SUFFIXES} */ (dtype)];
    const graph = await read(new URL(`model/onnx/model${suffix}.onnx`, BASE).href);
    session = await ort.InferenceSession.create(graph, { executionProviders: [device], logSeverityLevel: 3 });
    const generation = await fetch(new URL('model/generation_config.json', BASE));
    const { max_new_tokens } = await generation.json();
    reply({ loaded: { threads: ort.env.wasm.numThreads, max_new_tokens } });
}

/**
 * @param {string} address
 * @param {Kept | null} kept
 */
async function fetched(address, kept) {
    const response = await counted_fetch(address);
    if (!response.ok) {
        throw new Error(`${address} is not there (${response.status})`);
    }
    await kept?.put(address, response.clone());
    return response;
}

/** A picture `[height, width, 3]`. @param {Blob} image */
async function pixels(image) {
    const bitmap = await createImageBitmap(image);
    const { width, height } = bitmap;
    const canvas = /** @type {OffscreenCanvasRenderingContext2D} */ (
        new OffscreenCanvas(width, height).getContext('2d')
    );
    canvas.drawImage(bitmap, 0, 0);
    const { data } = canvas.getImageData(0, 0, width, height);
    return new ort.Tensor('uint8', Uint8Array.from(data.filter((_, place) => place % 4 < 3)), [height, width, 3]);
}

/** @param {Question} question */
async function generate({ image }) {
    const started = performance.now();
    const options = new ort.Tensor('float32', new Float32Array(), [0]);
    const made = await session.run({ image: await pixels(image), options }, ['texts', 'lengths']);
    const total_ms = performance.now() - started;
    const text = new TextDecoder().decode(/** @type {Uint8Array} */ (made.texts.data));
    const tokens = Number(made.lengths.data[0]);
    const answer = { sequences: [{ text, score: null }], first_token_ms: null, total_ms, tokens, stopped: false };
    reply({ answer });
}

serve(async (request) => {
    if ('load' in request) {
        await load(request.load);
    } else if ('generate' in request) {
        await generate(request.generate);
    }
});
