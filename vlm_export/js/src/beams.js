/**
 * Beam search by the rules of transformers' `GenerationMixin._beam_search`, in float32 as there.
 *
 * In each step the beams' continuations compete: (1 + ends of text) × beams of them are kept, so that as many as there
 * are beams go on even if all the others end. What ends among the best becomes an answer, with a score by its length.
 *
 * @typedef {import('./generate.js').Search} Search
 * @typedef {import('./generate.js').Sequence} Sequence
 * @typedef {import('./options.js').Plan} Plan
 * @typedef {{ token_ids: number[], score: number, row: number }} Beam `row` is that of its logits and cache.
 * @typedef {{ token_ids: number[], score: number, done: boolean }} Answer
 * @typedef {Sequence & { score: number }} Scored
 */

import { last } from './generate.js';
import { Best, log_softmax, process } from './logits.js';

const NEVER = -1e9; // in the place of -∞: what has it stays in order, and loses to everything else

/**
 * @param {Search} search
 * @returns {Promise<Scored[]>} best first
 */
export async function beam_search({ run, plan, history, random, heard, signal }) {
    const { num_beams, num_return_sequences, eos_token_ids, max_new_tokens, early_stopping } = plan;
    const kept = Math.max(2, 1 + eos_token_ids.length) * num_beams;
    /** @type {Beam[]} */
    let beams = Array.from({ length: num_beams }, (_, index) => ({ token_ids: [], score: index ? NEVER : 0, row: 0 }));
    /** @type {Answer[]} */
    let answers = Array.from({ length: num_beams }, () => ({ token_ids: [], score: NEVER, done: false }));
    for (let length = 1; !signal?.aborted; ++length) {
        const continuations = await continue_beams(run, plan, history, beams, kept, random);
        /** @type {(beam: Beam) => boolean} */
        const ends = ({ token_ids }) => length >= max_new_tokens || eos_token_ids.includes(last(token_ids));
        const ended = continuations.map(ends);
        const went_on = continuations.map(({ score, ...rest }, i) => ({
            score: add(score, ended[i] ? NEVER : 0),
            ...rest,
        }));
        const arrived = continuations.map(({ token_ids, score }, i) => {
            const done = ended[i] && i < num_beams; // the others are there to go on
            return { token_ids, score: add(by_length(score, length, plan), done ? 0 : NEVER), done };
        });
        beams = best_of(went_on, num_beams);
        answers = best_of([...answers, ...arrived], num_beams);

        const enough = early_stopping === true && answers.every(({ done }) => done);
        if (enough || ended.every(Boolean) || !can_improve(beams[0].score, answers, length, plan)) {
            await heard(answers[0].token_ids);
            return answers.slice(0, num_return_sequences).map((answer) => finished(answer, eos_token_ids));
        }
        await heard(beams[0].token_ids);
        await run.next(
            beams.map(({ token_ids }) => last(token_ids)),
            beams.map(({ row }) => row),
        );
        beams.forEach((beam, index) => (beam.row = index));
    }
    return cancelled(answers, beams, plan);
}

/**
 * @param {Search['run']} run
 * @param {Plan} plan
 * @param {number[]} history
 * @param {Beam[]} beams
 * @param {number} kept how many
 * @param {() => number} random
 * @returns {Promise<Beam[]>} the best continuations of all beams, best first, or drawn ones
 */
async function continue_beams(run, plan, history, beams, kept, random) {
    const rows = await run.logits();
    rows.forEach((scores, row) => {
        const { token_ids } = beams[row]; // of the prompt's one row, which all beams have, any
        log_softmax(scores);
        process(scores, plan, [...history, ...token_ids], token_ids.length);
    });
    const best = new Best(kept);
    beams.forEach(({ score, row }, index) => best.offer(rows[row], index, score, plan.do_sample ? random : null));
    return best.found.map(({ row: index, id, score }) => {
        const { token_ids, row } = beams[index];
        return { token_ids: [...token_ids, id], score, row };
    });
}

/**
 * Float32, so that what is added to -1e9 vanishes as it does in PyTorch.
 * @param {number} a
 * @param {number} b
 */
function add(a, b) {
    return Math.fround(a + b);
}

/** @type {(score: number, length: number, plan: Plan) => number} */
function by_length(score, length, { length_penalty }) {
    return Math.fround(score / length ** length_penalty);
}

/**
 * @template {{ score: number }} Candidate
 * @param {Candidate[]} candidates
 * @param {number} count
 * @returns {Candidate[]} the `count` highest, best first, the earlier of equal ones first
 */
function best_of(candidates, count) {
    return [...candidates].sort((a, b) => b.score - a.score).slice(0, count);
}

/**
 * Whether the best beam may still beat the worst answer.
 * @param {number} score of the beam
 * @param {Answer[]} answers
 * @param {number} length
 * @param {Plan} plan
 */
function can_improve(score, answers, length, plan) {
    const longest = plan.early_stopping === 'never' && plan.length_penalty > 0;
    const possible = by_length(score, longest ? plan.max_new_tokens : length, plan);
    const worst = Math.min(...answers.map((answer) => answer.score));
    return answers.some(({ done }) => possible > (done ? worst : NEVER));
}

/**
 * @param {Answer} answer
 * @param {number[]} eos_token_ids
 * @returns {Scored}
 */
function finished({ token_ids, score }, eos_token_ids) {
    const stopped = eos_token_ids.includes(last(token_ids));
    return { token_ids, score, finish_reason: stopped ? 'stop' : 'length' };
}

/**
 * What there is so far: answers, then beams by the scores that they would have as answers.
 * @param {Answer[]} answers
 * @param {Beam[]} beams
 * @param {Plan} plan
 * @returns {Scored[]}
 */
function cancelled(answers, beams, plan) {
    /** @type {Scored[]} */
    const running = beams.map(({ token_ids, score }) => ({
        token_ids,
        score: token_ids.length ? by_length(score, token_ids.length, plan) : score,
        finish_reason: 'cancelled',
    }));
    const done = answers.filter((answer) => answer.done).map((answer) => finished(answer, plan.eos_token_ids));
    return best_of([...done, ...running], plan.num_return_sequences);
}
