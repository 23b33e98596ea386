/** Greedy and beam search give PyTorch's tokens, one by one, and PyTorch's scores. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { VisionLanguageModel } from 'vlm-export';

import { inputs_of, suite } from './suite.js';

for (const [name, { path, runs }] of Object.entries(suite.repos)) {
    test(`${name}: ${runs.length} runs`, async () => {
        const model = await VisionLanguageModel.from_pretrained(path, { dtype: 'fp32' });
        for (const run of runs) {
            const { pixel_values, ...files } = await inputs_of(run);
            const given = run.from_files ? files : { ...files, pixel_values };
            const made = await model.generate({ ...given, ...run.options });
            const what = `${run.images} ${JSON.stringify(run.options)}`;
            const ids = run.expected.map(({ token_ids }) => token_ids);
            assert.deepEqual(
                made.map(({ token_ids }) => token_ids),
                ids,
                what,
            );
            made.forEach(({ score }, index) => assert_close(score, run.expected[index].score, what));
        }
        await model.dispose();
    });
}

/** @type {(score: number | null, expected: number | null, what: string) => void} */
function assert_close(score, expected, what) {
    if (expected === null) {
        assert.equal(score, null, what);
    } else {
        assert.ok(
            score !== null && Math.abs(score - expected) <= 1e-4 * Math.max(1, Math.abs(expected)),
            `${what}: ${score}, not ${expected}`,
        );
    }
}
