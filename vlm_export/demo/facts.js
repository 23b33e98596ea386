/**
 * What the site knows of the repo before it loads it: demo.json.
 *
 * @typedef {import('./worker.js').Device} Device
 * @typedef {{ file: string, caption: string | null }} Sample  The caption is what PyTorch says, to the prompt.
 * @typedef {{ verdict: 'pass' | 'fail', captions_exact: string | null }} Verified  As "31 of 32".
 * @typedef {{ of: string, name: string, address: string | null }} Licence
 * @typedef {{
 *     name: string, layout: 'captioner' | 'chat' | 'tasks' | 'components' | 'single', download_bytes: Record<string, number>,
 *     preferred: Record<Device, string[]>, verified: Record<string, Verified>,
 *     runtime: { bytes: number, cache: string }, cache: string | null, prompt: string, samples: Sample[],
 *     licences: Licence[], home: { repo_id: string, address: string } | null,
 * }} Facts
 */

/** @type {(facts: Facts) => boolean} */
export const takes_prompt = ({ layout }) => layout !== 'captioner' && layout !== 'single';

/** @type {(bytes: number) => string} */
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;

/** Whether the page comes from this machine. */
export const LOCAL = ['127.0.0.1', 'localhost', '[::1]'].includes(location.hostname);
