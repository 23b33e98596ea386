/**
 * Captions images in a page, which `drive.mjs` opens and whose functions it calls.
 *
 * @typedef {{ id: string, layout: import('../node/client.mjs').Layout, device: 'wasm' | 'webgpu',
 *     dtype?: import('../node/client.mjs').Dtype, generation: import('../node/client.mjs').Generation,
 *     items: import('../node/client.mjs').Item[] }} Request  Left out, the repo and the browser decide on the dtype. All
 *     files that items name are addresses, but for those that are written.
 * @typedef {{ transformers: string, onnxruntime: string, isolated: boolean, eos_token_ids: number[],
 *     sessions: Record<string, string> }} Done  `isolated` pages have threads. `sessions` are the dtypes that the graphs
 *     were loaded in.
 * @typedef {{ name: string, software: boolean, float16: boolean }} Adapter  `software` is one that a processor plays.
 */

import { env } from '@huggingface/transformers';

import { captionItem, endsOf, load } from '../node/client.mjs';

env.remoteHost = `${location.origin}/`;
env.useBrowserCache = false; // a second copy of every graph in memory
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);
const runtime = `${location.origin}/onnxruntime/ort-wasm-simd-threaded.asyncify`;
onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };

/** @type {import('../node/client.mjs').Files} */
const FILES = {
    async read(address) {
        return new Float32Array(await (await fetch(address)).arrayBuffer());
    },
    async text(id, file) {
        return (await fetch(this.address(id, file))).text();
    },
    address: (id, file) => `${location.origin}/${id}/resolve/main/${file}`,
    async runtime() {
        const ort = await import('onnxruntime-web');
        ort.env.wasm.wasmPaths = onnx.wasm.wasmPaths;
        return ort;
    },
    async write(name, data) {
        const blob = new Blob([/** @type {Float32Array<ArrayBuffer>} */ (data)]);
        const address = await new Promise((resolve, reject) => {
            const reader = new FileReader();
            reader.onload = () => resolve(reader.result);
            reader.onerror = () => reject(reader.error);
            reader.readAsDataURL(blob);
        });
        await window.save(name, address.slice(address.indexOf(',') + 1));
    },
};

/**
 * Has ONNX Runtime take no subgroups on an adapter that a processor plays. Those of SwiftShader are of 4, for which the
 * attention of onnxruntime-web 1.31 was not written: from 32 tokens on its results are wrong by half of the largest.
 */
async function leaveOutSubgroups() {
    if (!(await adapter())?.software) {
        return;
    }
    const own = Object.getOwnPropertyDescriptor(GPUAdapter.prototype, 'features');
    const features = /** @type {() => GPUSupportedFeatures} */ (own?.get);
    Object.defineProperty(GPUAdapter.prototype, 'features', {
        get() {
            return new Set([...features.call(this)].filter((feature) => !feature.startsWith('subgroup')));
        },
    });
}

/** @type {(request: Request) => Promise<Done>} */
async function run({ id, layout, device, dtype, generation, items }) {
    if (device === 'webgpu') {
        await leaveOutSubgroups();
    }
    const loaded = await load(layout, id, { device, ...(dtype && { dtype }) }, FILES);
    const sessions = Object.entries(loaded.model.sessions);
    const elsewhere = sessions.find(([, { config }]) => config.device !== device);
    if (elsewhere) {
        throw new Error(`${elsewhere[0]} was loaded on ${elsewhere[1].config.device} instead of ${device}`);
    }
    for (const index of items.keys()) {
        await window.send(await captionItem(loaded, items, index, generation, FILES));
    }
    return {
        transformers: env.version,
        onnxruntime: /** @type {string} */ (onnx.versions.web),
        isolated: crossOriginIsolated,
        eos_token_ids: endsOf(loaded.model),
        sessions: Object.fromEntries(sessions.map(([name, { config }]) => [name, config.dtype])),
    };
}

/** @returns {Promise<Adapter | null>} what WebGPU computes on, if there is anything */
async function adapter() {
    const found = await navigator.gpu?.requestAdapter();
    if (!found) {
        return null;
    }
    const { vendor, architecture, device, description, isFallbackAdapter } = found.info;
    const name = [vendor, architecture, device, description].filter(Boolean).join(' ');
    return { name, software: isFallbackAdapter, float16: found.features.has('shader-f16') };
}

Object.assign(window, { run, adapter });
