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

import { BASE, Kept, RUNTIME_FILES, counted_fetch } from './downloads.js';
import { reply, serve } from './requests.js';
import { RawImage, env } from './transformers/transformers.min.js';
import { VisionLanguageModel, load_from } from './vlm-export/index.js';

/** The settings of ONNX Runtime, all of which are there once transformers.js is imported. */
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);

/** @type {VisionLanguageModel} */
let model;
let stopping = new AbortController();

/** @param {Settings} settings */
async function load({ device, dtype, caches: names }) {
    load_from({ models: BASE, runtime: RUNTIME_FILES });
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

serve(async (request) => {
    if ('load' in request) {
        await load(request.load);
    } else if ('generate' in request) {
        await generate(request.generate);
    } else {
        stopping.abort();
    }
});
