/**
 * Captions images in Node.
 *
 * Reads one JSON `Request` from stdin. Answers on stdout, one JSON object a line: a `Caption` for each finished item,
 * then a `Done`; on failure `{"error": "…"}` and exit status 1. Warnings of the libraries go to stderr.
 * Its ONNX Runtime is onnxruntime-node, unless `onnxruntime-web.mjs` was imported before.
 *
 * @typedef {{ path: string } | { remote_host: string, id: string, revision: string }} Model
 * @typedef {{ model: Model, layout: import('./client.mjs').Layout, dtype: import('./client.mjs').Dtype,
 *     threads?: number, generation: import('./client.mjs').Generation, items: import('./client.mjs').Item[],
 *     warm_up_milliseconds?: number, repeat_milliseconds?: number }} Request  Without threads their number is ONNX
 *     Runtime's default. The warm-up is captions, at least so long, that nobody is told of. Then all items are
 *     captioned, and again until the time to repeat has passed.
 * @typedef {{ done: true, transformers: string, onnxruntime: string, node: string, load_milliseconds: number,
 *     peak_memory_bytes: number, eos_token_ids: number[] }} Done  The memory is that of the whole process.
 */

import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';

import { env } from '@huggingface/transformers';

import { captionItem, endsOf, load, reasonOf } from './client.mjs';

/** @type {import('./client.mjs').Files} */
const FILES = {
    async read(path) {
        const { buffer, byteOffset, byteLength } = await readFile(path);
        return new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength));
    },
    async write(path, { buffer, byteOffset, byteLength }) {
        await writeFile(path, new Uint8Array(buffer, byteOffset, byteLength));
    },
    text: (folder, file) => readFile(join(folder, file), 'utf8'),
    address: join,
    async runtime() {
        const web = /** @type {Record<symbol, any>} */ (globalThis)[Symbol.for('onnxruntime')];
        return web ?? (await import('onnxruntime-node')).default;
    },
};

/**
 * Keeps downloads in memory. Without any cache, transformers.js cannot load graphs from a server in Node: "Unable to
 * get model file path or buffer".
 * @returns {NonNullable<typeof env.customCache>}
 */
function memoryCache() {
    /** @type {Map<string, ArrayBuffer>} */
    const bodies = new Map();
    return {
        match: async (key) => (bodies.has(key) ? new Response(bodies.get(key)) : undefined),
        put: async (key, response) => void bodies.set(key, await response.arrayBuffer()),
    };
}

/**
 * Lets transformers.js read this model from where the request says, and from nowhere else.
 * @param {Model} model
 * @returns {string} what `from_pretrained` takes
 */
function allowOnly(model) {
    env.useFSCache = false;
    if ('path' in model) {
        env.allowRemoteModels = false;
        return model.path;
    }
    env.allowLocalModels = false;
    env.remoteHost = model.remote_host;
    // Not as an option: some requests of `pipeline` and `AutoProcessor` go to `main` whatever the revision is.
    env.remotePathTemplate = env.remotePathTemplate.replace('{revision}', encodeURIComponent(model.revision));
    env.useCustomCache = true;
    env.customCache = memoryCache();
    return model.id;
}

/** Whether ONNX Runtime is onnxruntime-web's. */
const onWasm = Symbol.for('onnxruntime') in globalThis;
/** Its settings, all of which are there once transformers.js is imported. */
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);

/**
 * @param {Request} request
 * @returns {import('./client.mjs').LoadOptions}
 */
function loadOptions({ dtype, threads }) {
    if (!onWasm) {
        return { dtype, session_options: threads ? { intraOpNumThreads: threads } : {} };
    }
    if (threads) {
        onnx.wasm.numThreads = threads;
    }
    // Beside a foreign ONNX Runtime transformers.js knows no device, but takes `auto` for those of the session options.
    return { dtype, device: 'auto', session_options: { executionProviders: ['wasm'] } };
}

/** @type {(loaded: import('./client.mjs').Loaded, request: Request) => Promise<void>} */
async function warmUp(loaded, { items, generation, warm_up_milliseconds = 0 }) {
    const start = performance.now();
    for (let index = 0; performance.now() - start < warm_up_milliseconds; index++) {
        await captionItem(loaded, items, index % items.length, generation, FILES);
    }
}

/** @returns {Promise<number>} the most memory that this process has held, in bytes */
async function peakMemory() {
    // Not `maxRSS` where it can be had otherwise: on Linux a process takes over its parent's at the start.
    const status = await readFile('/proc/self/status', 'utf8').catch(() => '');
    const peak = status.match(/^VmHWM:\s*(\d+) kB$/m);
    return 1024 * (peak ? Number(peak[1]) : process.resourceUsage().maxRSS);
}

/**
 * @param {import('./client.mjs').Caption | Done | { error: string }} answer
 * @param {() => void} [written] called when the line has left this process
 */
function send(answer, written) {
    process.stdout.write(`${JSON.stringify(answer)}\n`, written);
}

/** @param {unknown} error */
function fail(error) {
    send({ error: reasonOf(error) }, () => process.exit(1));
}

async function main() {
    /** @type {Request} */
    const request = JSON.parse(await text(process.stdin));
    const id = allowOnly(request.model);
    const start = performance.now();
    const loaded = await load(request.layout, id, loadOptions(request), FILES);
    const load_milliseconds = performance.now() - start;
    await warmUp(loaded, request);
    const first = performance.now();
    do {
        for (const index of request.items.keys()) {
            send(await captionItem(loaded, request.items, index, request.generation, FILES));
        }
    } while (performance.now() - first < (request.repeat_milliseconds ?? 0));
    await loaded.model.dispose();
    const { web, node } = onnx.versions;
    send({
        done: true,
        transformers: env.version,
        onnxruntime: /** @type {string} */ (onWasm ? web : node),
        node: process.version,
        load_milliseconds,
        peak_memory_bytes: await peakMemory(),
        eos_token_ids: endsOf(loaded.model),
    });
}

console.log = console.error;
// Not every promise of the loader is awaited: when a declared external-data file is missing, `from_pretrained` never
// settles and this is the only sign of it.
process.on('unhandledRejection', fail);
main().catch(fail);
