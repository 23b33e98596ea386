/**
 * A prompt and image that the model goes on from: as many rows as there are texts, each with its own cache.
 *
 * The prompt is run once, as a batch of one. Rows multiply, change places and go away when they are next continued.
 */

import { Tensor } from '@huggingface/transformers';

import { release_cache, select_rows } from './cache.js';

export class Continuation {
    #layout;
    #run;
    #image_features;

    /**
     * @param {import('./layouts.js').AnyLayout} layout
     * @param {import('./layouts.js').Prepared} prepared
     */
    static async begin(layout, { token_ids, image_features, grids }) {
        const input_ids = to_tensor([token_ids]);
        const run = await layout.run({ input_ids, image_features, grids });
        return new Continuation(layout, run, image_features);
    }

    /**
     * @param {import('./layouts.js').AnyLayout} layout
     * @param {import('./layouts.js').Run} run
     * @param {Tensor | undefined} image_features
     */
    constructor(layout, run, image_features) {
        this.#layout = layout;
        this.#run = run;
        this.#image_features = image_features;
    }

    /**
     * The scores of the next token of each row. They may be changed.
     * @returns {Promise<Float32Array[]>} `[vocabulary]` each
     */
    async logits() {
        const { dims } = this.#run.logits;
        const data = await read_floats(this.#run.logits);
        const [batch, positions, vocabulary] = dims;
        return Array.from({ length: batch }, (_, row) => {
            const end = (row + 1) * positions * vocabulary;
            return data.subarray(end - vocabulary, end);
        });
    }

    /**
     * Row `i` becomes what row `rows[i]` was, with one token more.
     * @param {number[]} token_ids
     * @param {number[]} rows
     */
    async next(token_ids, rows) {
        const past_key_values = await select_rows(this.#run.past_key_values, rows);
        // A captioner has features; the other layouts do not look at them.
        this.#image_features = this.#layout.carry(/** @type {Tensor} */ (this.#image_features), rows.length);
        const input_ids = to_tensor(token_ids.map((id) => [id]));
        const { shift } = this.#run;
        this.#run = await this.#layout.run({ input_ids, image_features: this.#image_features, past_key_values, shift });
    }

    release() {
        release_cache(this.#run.past_key_values);
    }
}

/** @param {number[][]} ids */
export function to_tensor(ids) {
    const data = BigInt64Array.from(ids.flat(), BigInt);
    return new Tensor('int64', data, [ids.length, ids[0].length]);
}

/** @param {Tensor} tensor */
async function read_floats(tensor) {
    if (tensor.location === 'gpu-buffer') {
        tensor = new Tensor(tensor.type, await tensor.ort_tensor.getData(true), tensor.dims);
    }
    return /** @type {Float32Array} */ ((tensor.type === 'float32' ? tensor : tensor.to('float32')).data);
}
