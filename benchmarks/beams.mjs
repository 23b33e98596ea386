/**
 * Times one way of generating in Node, as `beams.py` asks for it on stdin, and prints one JSON object.
 *
 * @typedef {object} Request
 * @property {string} repo
 * @property {import('@huggingface/transformers').DataType} dtype
 * @property {number} beams 0 is the pipeline of transformers.js
 * @property {number} tokens
 * @property {string[]} images
 */

import { text } from 'node:stream/consumers';

import { BaseStreamer, RawImage, env, pipeline } from '@huggingface/transformers';

import { VisionLanguageModel } from './js/index.js';

env.allowRemoteModels = false;
env.useFSCache = false;

/** Notes when each token came. Its first `put` is the start token. */
class Clock extends BaseStreamer {
    /** @type {number[]} by `performance.now()` */
    times = [];

    put() {
        this.times.push(performance.now());
    }

    end() {}
}

/** @type {(request: Request) => Promise<(image: RawImage, started: number) => Promise<object>>} */
async function load({ repo, dtype, beams, tokens }) {
    const length = { min_new_tokens: tokens, max_new_tokens: tokens };
    if (beams) {
        const model = await VisionLanguageModel.from_pretrained(repo, { dtype });
        return async (image) => {
            const made = await model.generate({ image, ...length, ...(beams > 1 && { num_beams: beams }) });
            const first_token_ms = /** @type {number} */ (made.timings.first_token_ms);
            return {
                first_token_ms,
                token_ms: (made.timings.total_ms - first_token_ms) / (tokens - 1),
                ids: made[0].token_ids,
            };
        };
    }
    const captioner = await pipeline('image-to-text', repo, { dtype });
    return async (image, started) => {
        const clock = new Clock();
        const { pixel_values } = await captioner.processor(image);
        const made = await captioner.model.generate({
            inputs: pixel_values,
            ...length,
            streamer: /** @type {any} its types ask for a `TextStreamer` too */ (clock),
        });
        const ids = /** @type {import('@huggingface/transformers').Tensor} */ (made);
        captioner.tokenizer.batch_decode(ids, { skip_special_tokens: true });
        const first_token_ms = clock.times[1] - started;
        const token_ms = (performance.now() - started - first_token_ms) / (tokens - 1);
        return { first_token_ms, token_ms, ids: ids.tolist()[0].slice(1).map(Number) };
    };
}

/** @type {Request} */
const request = JSON.parse(await text(process.stdin));
const generate = await load(request);
const images = await Promise.all(request.images.map((path) => RawImage.read(path)));
const runs = [];
for (const image of [images[0], images[0], ...images]) {
    runs.push(await generate(image, performance.now()));
}
console.log(JSON.stringify(runs.slice(2)));
