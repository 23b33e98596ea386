/**
 * One token after the other, the best or a drawn one.
 *
 * @typedef {{ token_ids: number[], score: number | null, finish_reason: 'stop' | 'length' | 'cancelled' }} Sequence
 * @typedef {object} Search
 * @property {import('./continuation.js').Continuation} run
 * @property {import('./options.js').Plan} plan
 * @property {number[]} history of the prompt
 * @property {() => number} random
 * @property {(token_ids: number[]) => Promise<void>} heard is told of the first sequence after each step
 * @property {AbortSignal} [signal]
 */

import { argmax, draw, process } from './logits.js';

/**
 * @param {Search} search
 * @returns {Promise<Sequence[]>}
 */
export async function one_by_one({ run, plan, history, random, heard, signal }) {
    const sequences = nothing(plan);
    /** @type {(scores: Float32Array) => number} */
    const pick = plan.do_sample ? (scores) => draw(scores, random) : argmax;
    let live = sequences;
    while (!signal?.aborted) {
        const rows = await run.logits();
        rows.forEach((scores, row) => {
            const { token_ids } = live[row];
            process(scores, plan, [...history, ...token_ids], token_ids.length);
        });
        const row_of = live.map((_, index) => (rows.length === 1 ? 0 : index)); // the prompt's row is everyone's
        live.forEach((sequence, index) => take(sequence, pick(rows[row_of[index]]), plan));
        await heard(sequences[0].token_ids);
        const open = [...live.keys()].filter((index) => live[index].finish_reason === 'cancelled');
        live = open.map((index) => live[index]);
        if (!live.length) {
            break;
        }
        await run.next(
            live.map(({ token_ids }) => last(token_ids)),
            open.map((index) => row_of[index]),
        );
    }
    return sequences;
}

/**
 * @param {{ num_return_sequences: number }} plan
 * @returns {Sequence[]} before the first token; nothing else ends without a reason of its own
 */
export function nothing({ num_return_sequences }) {
    return Array.from({ length: num_return_sequences }, () => ({
        token_ids: [],
        score: null,
        finish_reason: 'cancelled',
    }));
}

/**
 * @param {number[]} token_ids at least one
 * @returns {number}
 */
export function last(token_ids) {
    return token_ids[token_ids.length - 1];
}

/**
 * @param {Sequence} sequence
 * @param {number} id
 * @param {import('./options.js').Plan} plan
 */
function take(sequence, id, { eos_token_ids, max_new_tokens }) {
    sequence.token_ids.push(id);
    if (eos_token_ids.includes(id)) {
        sequence.finish_reason = 'stop';
    } else if (sequence.token_ids.length === max_new_tokens) {
        sequence.finish_reason = 'length';
    }
}
