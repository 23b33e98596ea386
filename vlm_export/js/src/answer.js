/**
 * The worker's side of `remote.js`: loads a model when it is asked to, and generates.
 *
 * @typedef {import('./remote.js').Request} Request
 * @typedef {import('./remote.js').Reply} Reply
 */

import { VisionLanguageModel } from './model.js';

/** @type {VisionLanguageModel | undefined} */
let model;
/** Of the calls that run, by their number. @type {Map<number, AbortController>} */
const running = new Map();

/** @type {(reply: Reply) => void} */
const reply = (value) => postMessage(value);

/** Answers what `WorkerModel` asks of this worker, from now on. */
export function answer() {
    addEventListener('message', async (/** @type {MessageEvent<Request>} */ { data }) => {
        try {
            await act(data);
        } catch (error) {
            const { name, message } = error instanceof Error ? error : new Error(String(error));
            reply({ number: data.number, error: { name, message } });
        }
    });
}

/** @type {(request: Request) => Promise<void>} */
async function act(request) {
    if ('load' in request) {
        await load(request);
    } else if ('generate' in request) {
        await generate(request);
    } else if ('stop' in request) {
        running.get(request.number)?.abort();
    } else {
        await model?.dispose();
        reply({ number: request.number, done: undefined });
    }
}

/** @param {Extract<Request, { load: unknown }>} request */
async function load({ number, load: [id, options] }) {
    model = await VisionLanguageModel.from_pretrained(id, {
        ...options,
        progress_callback: (progress) => reply({ number, progress }),
    });
    const { layout, takes_prompt, prefix_conditioning, generation_config, dtype, device } = model;
    const facts = { layout, takes_prompt, prefix_conditioning, generation_config, dtype, device };
    reply({ number, done: structuredClone(facts) });
}

/** @param {Extract<Request, { generate: unknown }>} request */
async function generate({ number, generate: options }) {
    if (!model) {
        throw new Error('no model is loaded in this worker');
    }
    const stopping = new AbortController();
    running.set(number, stopping);
    try {
        const sequences = await model.generate({
            ...options,
            signal: stopping.signal,
            on_token: (token) => reply({ number, token }),
        });
        reply({ number, done: { sequences: [...sequences], timings: sequences.timings } });
    } finally {
        running.delete(number);
    }
}
