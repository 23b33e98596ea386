/**
 * Captions pictures, or answers prompts, by a single graph, with ONNX Runtime alone: no class of transformers.js knows it.
 *
 * What reads pictures and texts is transformers.js's; a page of a user's takes pixels out of a canvas, and the caption
 * out of the graph.
 *
 * @typedef {import('./client.mjs').Files} Files
 * @typedef {import('./client.mjs').Item} Item
 * @typedef {import('./client.mjs').ModelInputs} ModelInputs
 */

import { AutoImageProcessor, AutoTokenizer, RawImage, Tensor } from '@huggingface/transformers';

import { EARLY_STOPPING, SAMPLING_OPTIONS, SEARCH_OPTIONS, SINGLE_OPTIONS, SUFFIXES } from './contract.mjs';
import { loadPrompts, readTensor } from './prompts.mjs';

/** What the graph does where neither a caller nor `generation_config.json` says otherwise. */
const DEFAULTS = {
    repetition_penalty: 1,
    no_repeat_ngram_size: 0,
    min_new_tokens: 0,
    length_penalty: 1,
    early_stopping: false,
    temperature: 1,
    top_k: 50,
    top_p: 1,
    seed: 0,
};

/**
 * @param {Tensor} pixels `[1, 3, height, width]` in 0…255
 * @returns {[Uint8Array, number[]]} bytes `[height, width, 3]` and their shape
 */
function asPicture({ data, dims }) {
    const [height, width] = dims.slice(-2);
    const size = height * width;
    const bytes = new Uint8Array(size * 3);
    for (let place = 0; place < size; place++) {
        for (let channel = 0; channel < 3; channel++) {
            bytes[place * 3 + channel] = Number(data[channel * size + place]);
        }
    }
    return [bytes, [height, width, 3]];
}

/**
 * @param {string} id
 * @param {Files} files
 * @returns {Promise<(item: Item, modelInputs: ModelInputs) => Promise<Record<string, Tensor>>>} makes a captioner's pixels
 */
async function loadPixels(id, files) {
    const processor = await AutoImageProcessor.from_pretrained(id);
    return async ({ image, pixel_values }, modelInputs) => {
        if (image !== undefined) {
            modelInputs.pixel_values = (await processor(await RawImage.read(image))).pixel_values;
        }
        const pixels = pixel_values ? await readTensor(pixel_values, files) : modelInputs.pixel_values;
        return { pixel_values: /** @type {Tensor} */ (pixels) };
    };
}

/** @type {(id: string, options: import('./client.mjs').LoadOptions, files: Files) => Promise<import('./client.mjs').Loaded>} */
export async function loadSingle(id, { dtype = 'fp32', device, session_options }, files) {
    const ort = await files.runtime();
    const own = JSON.parse(await files.text(id, 'generation_config.json'));
    const suffix = SUFFIXES[/** @type {keyof typeof SUFFIXES} */ (dtype)];
    /** At 0 it logs which nodes it leaves to the processor. @type {import('onnxruntime-common').InferenceSession.SessionOptions} */
    const providers = device === 'webgpu' ? { executionProviders: ['webgpu'], logSeverityLevel: 0 } : {};
    const graph = files.address(id, `onnx/model${suffix}.onnx`);
    const session = await ort.InferenceSession.create(graph, { logSeverityLevel: 3, ...providers, ...session_options });
    const isChat = session.inputNames.includes('input_ids');
    const inputsOf = isChat ? (await loadPrompts(id, files)).inputsOf : await loadPixels(id, files);
    const tokenizer = await AutoTokenizer.from_pretrained(id);

    /** @type {import('./client.mjs').Loaded['caption']} */
    async function caption(item, options, modelInputs) {
        const inputs = await inputsOf(item, modelInputs);
        const asked = /** @type {Record<string, any>} */ ({ ...DEFAULTS, ...own, ...options });
        asked.early_stopping = EARLY_STOPPING.indexOf(asked.early_stopping);
        asked.temperature = asked.do_sample ? asked.temperature : 0;
        const more = own.num_beams > 1 ? SEARCH_OPTIONS : SAMPLING_OPTIONS;
        const numbers = [...SINGLE_OPTIONS, ...more].map((name) => asked[name]);
        /** @type {Record<string, import('onnxruntime-common').Tensor>} */
        const fed = { options: new ort.Tensor('float32', numbers, [numbers.length]) };
        for (const name of session.inputNames.filter((name) => name !== 'options')) {
            const { type, data, dims } = inputs[name] ?? {};
            fed[name] =
                name === 'image'
                    ? new ort.Tensor('uint8', ...asPicture(inputs.pixel_values))
                    : new ort.Tensor(/** @type {any} */ (type), /** @type {any} */ (data), dims);
        }
        const made = await session.run(fed);
        const count = Number(made.lengths.data[0]);
        const ids = [.../** @type {BigInt64Array} */ (made.sequences.data)].slice(0, count);
        options.streamer.put([[]]);
        for (const [place, token] of ids.entries()) {
            const score = /** @type {Float32Array} */ (made.scores.data)[place];
            options.logits_processor([], new Tensor('float32', Float32Array.from([Math.exp(score)]), [1, 1]));
            options.streamer.put([[token]]);
        }
        if (made.texts) {
            return new TextDecoder('utf-8', { fatal: true }).decode(/** @type {Uint8Array} */ (made.texts.data));
        }
        return tokenizer.decode(ids, { skip_special_tokens: true }).trim();
    }
    const model = {
        sessions: { model: { config: { dtype, device } } },
        generation_config: own,
        dispose: () => session.release(),
    };
    return { model: /** @type {any} */ (model), caption };
}
