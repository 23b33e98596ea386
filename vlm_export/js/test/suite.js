/**
 * The repos and expectations that `tests/test_js.py` of vlm-export prepares.
 *
 * @typedef {import('vlm-export').GenerateOptions} GenerateOptions
 * @typedef {{ path: string, shape: number[] }} PixelValues A file of little-endian float32.
 * @typedef {object} Run
 * @property {string[]} images
 * @property {PixelValues} pixel_values
 * @property {boolean} from_files whether pixel values are to be made of the images
 * @property {string | null} prompt
 * @property {GenerateOptions} options
 * @property {{ token_ids: number[], score: number | null }[]} expected what PyTorch said
 *
 * @typedef {object} Warped What PyTorch makes of scores.
 * @property {number[]} scores
 * @property {{ temperature: number, top_k: number, top_p: number }} options
 * @property {number} least how many tokens stay in any case
 * @property {number[]} probabilities
 */

import { readFile } from 'node:fs/promises';

import { Tensor, env } from '@huggingface/transformers';

if (!process.env.VLM_EXPORT_SUITE) {
    throw new Error('VLM_EXPORT_SUITE is not set: run these tests by `pytest tests/test_js.py` in a checkout');
}
env.allowRemoteModels = false;
env.useFSCache = false;

/** @type {{ repos: Record<string, { path: string, runs: Run[] }>, warped: Warped[] }} */
export const suite = JSON.parse(await readFile(process.env.VLM_EXPORT_SUITE, 'utf-8'));

/** @param {PixelValues} pixel_values */
export async function read_tensor({ path, shape }) {
    const { buffer, byteOffset, byteLength } = await readFile(path);
    return new Tensor('float32', new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength)), shape);
}

/**
 * @param {Run} run
 * @returns {Promise<GenerateOptions & { pixel_values: Tensor }>} of it what `generate()` takes
 */
export async function inputs_of({ images, pixel_values, prompt }) {
    return { images, pixel_values: await read_tensor(pixel_values), ...(prompt !== null && { prompt }) };
}
