/**
 * Runtime, precision and beams: what there is to choose, why some of it is off, and what was chosen.
 *
 * @typedef {import('./facts.js').Facts} Facts
 * @typedef {import('./worker.js').Device} Device
 * @typedef {{ device: Device, dtype: string, num_beams: number }} Chosen
 * @typedef {{ value: string, text: string, detail?: string[], reason?: string | null }} Option  `reason` says why it
 *     cannot be chosen.
 */

import { $ } from './dom.js';
import { megabytes } from './facts.js';

const BEAMS = [1, 2, 3, 4, 5];

/** @type {Facts} */
let facts;
/** @type {{ missing: string | null, half: boolean }} why there is none, and whether it computes in float16 */
let webgpu = { missing: null, half: false };

/** @type {(name: string) => boolean} */
const is_chosen = (name) => document.querySelector(`input[name=${name}]:checked`) !== null;
/** @type {(name: string) => string} */
const value_of = (name) => $(`input[name=${name}]:checked`, HTMLInputElement).value;
const device = () => /** @type {Device} */ (value_of('device'));

/** @returns {Chosen} */
export const chosen = () => ({ device: device(), dtype: value_of('dtype'), num_beams: Number(value_of('beams')) });

/**
 * Offers all that the repo and this browser have.
 * @param {Facts} known
 */
export async function offer_choices(known) {
    facts = known;
    webgpu = await look_for_webgpu();
    if (!webgpu.missing && !usable('webgpu').length) {
        webgpu.missing = 'this repo has no precision for it';
    }
    offer('device', [
        { value: 'wasm', text: 'WASM' },
        { value: 'webgpu', text: 'WebGPU', reason: webgpu.missing },
    ]);
    pick('device', 'wasm');
    offer_dtypes();
    offer(
        'beams',
        BEAMS.map((count) => ({ value: String(count), text: String(count), reason: count > 1 ? no_beams() : null })),
    );
    pick('beams', '1');
    $('#dtype-note').textContent =
        `Sizes are the model's. The runtime is ${megabytes(facts.runtime.bytes)} more, once for all of them.`;
    note();
    $('#device').addEventListener('change', () => {
        offer_dtypes();
        note();
    });
}

/** A row of radio buttons. @type {(name: string, options: Option[]) => void} */
function offer(name, options) {
    const before = is_chosen(name) ? value_of(name) : null;
    const labels = options.map(({ value, text, detail = [], reason }) => {
        const label = document.createElement('label');
        const input = Object.assign(document.createElement('input'), { type: 'radio', name, value });
        input.disabled = Boolean(reason);
        input.checked = value === before && !reason;
        const words = document.createElement('span');
        words.append(
            text,
            ...detail.map((part) => Object.assign(document.createElement('small'), { textContent: part })),
        );
        label.append(input, words);
        label.title = reason ?? '';
        return label;
    });
    $(`#${name}`).replaceChildren($(`#${name} legend`), ...labels);
}

const no_beams = () => (facts.layout === 'single' ? 'one file generates as it was exported' : null);

/** @type {(name: string, value: string) => void} */
function pick(name, value) {
    $(`input[name=${name}][value="${value}"]`, HTMLInputElement).checked = true;
}

/** @returns {Promise<typeof webgpu>} */
async function look_for_webgpu() {
    if (!isSecureContext) {
        return { missing: 'browsers have it only on https, or from this machine', half: false };
    }
    if (!navigator.gpu) {
        return { missing: 'this browser has none', half: false };
    }
    const adapter = await navigator.gpu.requestAdapter().catch(() => null);
    if (!adapter) {
        return { missing: 'no graphics adapter', half: false };
    }
    return { missing: null, half: adapter.features.has('shader-f16') };
}

/**
 * Why a dtype cannot be chosen: WebGPU has not always float16.
 * @type {(dtype: string, device: Device) => string | null}
 */
function obstacle(dtype, device) {
    return device === 'webgpu' && dtype.endsWith('16') && !webgpu.half ? 'no float16 in this graphics adapter' : null;
}

/**
 * Of the repo's dtypes those that run on a device, the preferred one first, those that failed last.
 * @type {(device: Device) => string[]}
 */
function usable(device) {
    const there = Object.keys(facts.download_bytes).filter((dtype) => !obstacle(dtype, device));
    const passed = there.filter((dtype) => facts.verified[dtype]?.verdict !== 'fail');
    return [...facts.preferred[device].filter((dtype) => passed.includes(dtype)), ...passed, ...there];
}

function offer_dtypes() {
    const options = Object.entries(facts.download_bytes).map(([dtype, bytes]) => ({
        value: dtype,
        text: dtype,
        detail: [megabytes(bytes), verdict(dtype)],
        reason: obstacle(dtype, device()),
    }));
    offer('dtype', options);
    if (!is_chosen('dtype')) {
        pick('dtype', usable(device())[0]);
    }
}

/** @type {(dtype: string) => string} */
function verdict(dtype) {
    const said = facts.verified[dtype];
    if (!said) {
        return 'not verified';
    }
    const count = said.captions_exact ? ` ${said.captions_exact.replace(' of ', '/')}` : '';
    return said.verdict === 'pass' ? `verified ✓${count}` : `failed verification ✗${count}`;
}

/**
 * Says below the choices why one of them is off, and how many threads there are.
 * @param {number} [threads]
 */
export function note(threads) {
    const lines = webgpu.missing ? [`No WebGPU: ${webgpu.missing}.`] : [];
    if (!crossOriginIsolated) {
        lines.push(
            `WASM: 1 thread; more need ${isSecureContext ? '' : 'https and '}headers (COOP, COEP) that this site does not send.`,
        );
    } else if (threads && device() === 'wasm') {
        lines.push(`WASM: ${threads === 1 ? '1 thread' : `${threads} threads`}.`);
    }
    const dtypes = Object.keys(facts.download_bytes);
    for (const reason of new Set(dtypes.map((dtype) => obstacle(dtype, device())))) {
        if (reason) {
            lines.push(`${dtypes.filter((dtype) => obstacle(dtype, device()) === reason).join(', ')}: ${reason}.`);
        }
    }
    if (no_beams()) {
        lines.push(`Beams: ${no_beams()}.`);
    }
    $('#note').textContent = lines.join(' ');
}
