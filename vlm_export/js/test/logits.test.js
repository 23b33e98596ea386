/** The rules on scores, drawing, choosing the best, and bringing rows into another order, each on its own. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Tensor, random } from '@huggingface/transformers';

import { plan_moves, select_rows } from '../src/cache.js';
import { Best, draw, log_softmax, warp } from '../src/logits.js';
import { suite } from './suite.js';

const generator = new random.Random(1);
const uniform = () => generator.random();
/** @param {number} count */
const floats = (count) => Float32Array.from({ length: count }, () => generator.gauss(0, 3));

/** @param {Float32Array} scores */
function softmax(scores) {
    const weights = Array.from(scores, Math.exp);
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((weight) => weight / sum);
}

suite.warped.forEach(({ scores, options, least, probabilities }) => {
    test(`PyTorch's probabilities: ${JSON.stringify(options)}`, () => {
        const mine = Float32Array.from(scores);
        warp(mine, options, least);
        softmax(mine).forEach((probability, id) => {
            assert.equal(probability > 0, probabilities[id] > 0, `token ${id}`);
            assert.ok(Math.abs(probability - probabilities[id]) < 1e-6, `token ${id}`);
        });
    });
});

/**
 * Pearson's χ² of 20000 draws among what has a probability, below the 99.9 % quantile for as many degrees of freedom.
 * @param {number[]} counts
 * @param {number[]} probabilities
 * @param {number} quantile
 */
function assert_drawn(counts, probabilities, quantile) {
    const total = counts.reduce((a, b) => a + b);
    const statistic = counts.reduce((sum, count, id) => {
        const expected = probabilities[id] * total;
        assert.ok(expected > 0 || count === 0, `token ${id} has no probability, and was drawn`);
        return expected > 0 ? sum + (count - expected) ** 2 / expected : sum;
    }, 0);
    assert.ok(statistic < quantile, `χ² ${statistic}`);
}

test('draws with the probabilities', () => {
    const scores = Float32Array.from([1, 0, -Infinity, 2, -1, 0.5]);
    const counts = Array(6).fill(0);
    for (let i = 0; i < 20000; ++i) {
        counts[draw(scores, uniform)]++;
    }
    assert_drawn(counts, softmax(scores), 18.5);
});

test('draws without replacement with the probabilities', () => {
    const scores = Float32Array.from([1, 0, 2, -1, 0.5]);
    const probabilities = softmax(scores);
    const first = Array(5).fill(0);
    const pairs = Array(25).fill(0);
    for (let i = 0; i < 20000; ++i) {
        const best = new Best(2);
        best.offer(scores, 0, 0, uniform);
        const [one, other] = best.found.map(({ id }) => id);
        first[one]++;
        pairs[5 * one + other]++;
    }
    assert_drawn(first, probabilities, 18.5);
    const both = pairs.map((_, pair) => {
        const [one, other] = [Math.floor(pair / 5), pair % 5];
        return one === other ? 0 : (probabilities[one] * probabilities[other]) / (1 - probabilities[one]);
    });
    assert_drawn(pairs, both, 43.9);
});

test('the best of several rows are those of a sort', () => {
    for (const size of [1, 4, 9]) {
        const rows = [floats(50), floats(50), floats(50)];
        const bonus = [0, -1.5, 1];
        const best = new Best(size);
        rows.forEach((scores, row) => best.offer(scores, row, bonus[row]));
        const all = rows.flatMap((scores, row) =>
            Array.from(scores, (score, id) => ({ score: Math.fround(score + bonus[row]), row, id })),
        );
        const sorted = all.sort((a, b) => b.score - a.score).slice(0, size);
        assert.deepEqual(
            best.found.map(({ score, row, id }) => ({ score, row, id })),
            sorted,
        );
    }
});

test('log-probabilities', () => {
    const scores = floats(40);
    const expected = softmax(scores).map(Math.log);
    log_softmax(scores);
    scores.forEach((score, id) => assert.ok(Math.abs(score - expected[id]) < 1e-5));
});

/**
 * Every way of choosing 1 to 4 rows.
 * @param {number} batch
 */
function* choices(batch) {
    for (let code = 0; code < batch ** batch; ++code) {
        yield Array.from({ length: batch }, (_, place) => Math.floor(code / batch ** place) % batch);
    }
}

test('rows come into any order', async () => {
    for (const batch of [1, 2, 3, 4]) {
        for (const rows of choices(batch)) {
            const cache = make_cache(batch);
            const moves = plan_moves(rows).filter(([to]) => to !== -1);
            assert.ok(moves.length <= rows.filter((row, place) => row !== place).length, `${rows}`);
            check_rows(await select_rows(cache, rows), rows);
        }
    }
});

test('rows multiply and go away', async () => {
    check_rows(await select_rows(make_cache(1), [0, 0, 0]), [0, 0, 0]);
    check_rows(await select_rows(make_cache(3), [2, 0]), [2, 0]);
    const carried = make_cache(2, 'past_key_values.0.encoder.key');
    check_rows(await select_rows(carried, [1]), [1]);
    assert.equal(await select_rows(carried, [0, 1]), carried);
});

/**
 * `[batch, 1, 2, 2]`, row r full of r.
 * @param {number} batch
 */
function make_cache(batch, name = 'past_key_values.0.key') {
    const data = Float32Array.from({ length: 4 * batch }, (_, index) => Math.floor(index / 4));
    return { [name]: new Tensor('float32', data, [batch, 1, 2, 2]) };
}

/** @type {(cache: Record<string, Tensor>, rows: number[]) => void} */
function check_rows(cache, rows) {
    const [tensor] = Object.values(cache);
    assert.deepEqual(tensor.dims, [rows.length, 1, 2, 2]);
    assert.deepEqual(
        Array.from(tensor.data),
        rows.flatMap((row) => Array(4).fill(row)),
    );
}
