/**
 * The repos and expectations that `tests/test_js.py` of vlm-export prepares.
 *
 * @typedef {{ path: string, shape: number[] }} PixelValues A file of little-endian float32.
 * @typedef {object} Run
 * @property {string[]} images
 * @property {PixelValues} pixel_values
 * @property {string | null} prompt
 * @property {import('vlm-export').GenerateOptions} options
 * @property {{ token_ids: number[], score: number | null }[]} expected what PyTorch said
 */

import { readFile } from 'node:fs/promises';

import { Tensor, env } from '@huggingface/transformers';

if (!process.env.VLM_EXPORT_SUITE) {
    throw new Error('VLM_EXPORT_SUITE is not set: run these tests by `pytest tests/test_js.py` in a checkout');
}
env.allowRemoteModels = false;
env.useFSCache = false;

/** @type {{ repos: Record<string, { path: string, runs: Run[] }>, warped: any[] }} */
export const suite = JSON.parse(await readFile(process.env.VLM_EXPORT_SUITE, 'utf-8'));

/** @param {PixelValues} pixel_values */
export async function read_tensor({ path, shape }) {
    const { buffer, byteOffset, byteLength } = await readFile(path);
    return new Tensor('float32', new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength)), shape);
}

/**
 * @param {Run} run
 * @returns {Promise<import('vlm-export').GenerateOptions>} of it what `generate()` takes
 */
export async function inputs_of({ images, pixel_values, prompt }) {
    return { images, pixel_values: await read_tensor(pixel_values), ...(prompt !== null && { prompt }) };
}
