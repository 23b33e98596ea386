/**
 * Where files come from. transformers.js takes the runtime from a CDN where nothing is said; here that is an error, so
 * that no page asks a server that its author did not name.
 *
 * @typedef {import('../index.d.ts').Places} Places
 */

import { env } from '@huggingface/transformers';

import { check_keys } from './options.js';

const CDN = /^https:\/\/cdn\.jsdelivr\.net\//;
/** In Node there is none. */
const wasm = 'web' in /** @type {object} */ (env.backends.onnx.versions ?? {}) ? env.backends.onnx.wasm : undefined;
/** What transformers.js has set, if nobody was before it. */
const BEFORE = wasm?.wasmPaths;

/**
 * Says where repos and the runtime lie.
 *
 * @param {Places} places
 * @throws {TypeError} an unknown place, or a runtime where there is none to be loaded
 */
export function load_from(places) {
    check_keys('load_from()', places, ['models', 'runtime']);
    const { models, runtime } = places;
    if (models !== undefined) {
        find_models(new URL(folder(models)));
    }
    if (runtime !== undefined) {
        if (!wasm) {
            throw new TypeError('runtime: Node has its own, onnxruntime-node: leave it out');
        }
        wasm.wasmPaths = paths(runtime);
    }
}

/**
 * What transformers.js takes for remote has to be on a web server; the files of an extension, or of an app, are local to
 * it. Those of a server are not: of a local model it asks for a file's size with a request that nobody reads to its end,
 * and six of those block the server for the page.
 * @param {URL} place
 */
function find_models({ protocol, href, pathname }) {
    env.allowRemoteModels = /^https?:$/.test(protocol);
    env.allowLocalModels = !env.allowRemoteModels;
    if (env.allowRemoteModels) {
        env.remoteHost = href;
        env.remotePathTemplate = '{model}/';
    } else {
        env.localModelPath = pathname;
    }
}

/** @throws {Error} the runtime would come from a CDN that nobody named */
export function check_runtime() {
    if (wasm && wasm.wasmPaths === BEFORE && typeof BEFORE === 'object' && CDN.test(String(BEFORE.wasm))) {
        throw new Error(
            `the runtime would be fetched from ${new URL(String(BEFORE.wasm)).host}: say where it lies, as ` +
                "load_from({ runtime: '/onnxruntime/' }), with the files of onnxruntime-web/dist there",
        );
    }
}

/** @type {(runtime: NonNullable<Places['runtime']>) => { mjs: string, wasm: string }} */
function paths(runtime) {
    if (typeof runtime === 'object' && 'wasm' in runtime) {
        return { mjs: absolute(runtime.mjs), wasm: absolute(runtime.wasm) };
    }
    const place = folder(runtime);
    return { mjs: `${place}${build()}.mjs`, wasm: `${place}${build()}.wasm` };
}

/** The build that transformers.js takes: not all browsers run the same. */
function build() {
    const name = typeof BEFORE === 'object' ? String(BEFORE.wasm).match(/ort-wasm[\w.-]*(?=\.wasm)/)?.[0] : undefined;
    return name ?? 'ort-wasm-simd-threaded.asyncify';
}

/** @type {(place: string | URL) => string} */
function folder(place) {
    return absolute(place).replace(/\/*$/, '/');
}

/** Beside the page, or of a worker beside its script. @type {(place: string | URL) => string} */
function absolute(place) {
    return new URL(place, globalThis.document?.baseURI ?? globalThis.location?.href).href;
}
