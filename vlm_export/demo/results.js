/**
 * The images that were given, what was said of each, and all of it as CSV.
 *
 * @typedef {import('./facts.js').Sample} Sample
 * @typedef {{
 *     device: string, dtype: string, num_beams: number, prompt: string | null,
 *     text: string, score: number | null, tokens: number, first_token_ms: number | null, total_ms: number,
 * }} Result
 * @typedef {{ image: Blob, name: string, sample: Sample | null }} Given
 * @typedef {Given & { address: string, results: Result[] }} Picture  With the address under which the page shows it.
 */

import { $ } from './dom.js';

/** @type {(keyof Result)[]} */
const COLUMNS = ['dtype', 'device', 'num_beams', 'prompt', 'text', 'score', 'tokens', 'first_token_ms', 'total_ms'];

/** @type {Picture[]} */
export const pictures = [];
/** @type {Picture | null} */
export let shown = null;

/**
 * Keeps images; a sample is kept once.
 * @param {Given[]} given
 * @returns {Picture[]} as they are kept
 */
export function keep(given) {
    return given.map((one) => {
        const known = pictures.find(({ sample }) => sample && sample === one.sample);
        const picture = known ?? { ...one, address: URL.createObjectURL(one.image), results: [] };
        if (!known) {
            pictures.push(picture);
        }
        return picture;
    });
}

/**
 * Puts an image on the stage, with what was said of it.
 * @param {Picture} picture
 * @param {(picture: Picture) => void} choose what a click on another does
 */
export async function show(picture, choose) {
    shown = picture;
    const stage = $('#image', HTMLImageElement);
    stage.src = picture.address;
    stage.alt = picture.name;
    stage.hidden = false;
    $('#drop').hidden = true;
    $('#pictures ul').replaceChildren(
        ...pictures.map((one) => thumbnail(one.address, one.name, one === shown, () => choose(one))),
    );
    $('#pictures').hidden = pictures.length < 2;
    show_results();
    await stage.decode();
    stage.classList.toggle('small', Math.max(stage.naturalWidth, stage.naturalHeight) < 200);
}

/** @type {(address: string, name: string, pressed: boolean, choose: () => void) => HTMLLIElement} */
export function thumbnail(address, name, pressed, choose) {
    const button = Object.assign(document.createElement('button'), { type: 'button', ariaPressed: String(pressed) });
    button.append(Object.assign(new Image(), { src: address, alt: name }));
    button.title = name;
    button.addEventListener('click', choose);
    const item = document.createElement('li');
    item.append(button);
    return item;
}

/**
 * Adds what was said, in the place of what the same settings said before.
 * @param {Picture} picture
 * @param {Result} result
 */
export function add(picture, result) {
    const others = picture.results.filter((one) => settings_of(one) !== settings_of(result));
    picture.results = [...others, result];
    if (picture === shown) {
        show_results();
    }
}

/** @type {(result: Result) => string} */
function settings_of({ dtype, device, num_beams, prompt }) {
    return JSON.stringify([dtype, device, num_beams, prompt]);
}

function show_results() {
    $('#results ul').replaceChildren(...(shown?.results ?? []).map(as_item));
    $('#results').hidden = !pictures.some(({ results }) => results.length);
}

/** @type {(result: Result) => HTMLLIElement} */
function as_item(result) {
    const { dtype, device, num_beams, prompt, text, score } = result;
    const how = [dtype, device === 'wasm' ? 'WASM' : 'WebGPU', ...(num_beams > 1 ? [`${num_beams} beams`] : [])];
    const figures = [speed(result), ...(score === null ? [] : [`score ${score.toFixed(3)}`])];
    const item = document.createElement('li');
    item.append(
        part('h3', how.join(' · ')),
        ...(prompt ? [part('p', prompt, 'note')] : []),
        part('p', text, 'said'),
        part('p', figures.join(' · '), 'note'),
    );
    return item;
}

/** @type {(tag: string, text: string, kind?: string) => HTMLElement} */
function part(tag, text, kind = '') {
    return Object.assign(document.createElement(tag), { textContent: text, className: kind });
}

/** @type {(figures: { first_token_ms: number | null, total_ms: number, tokens: number }) => string} */
export function speed({ first_token_ms, total_ms, tokens }) {
    const rate = tokens > 1 ? (1000 * (tokens - 1)) / (total_ms - (first_token_ms ?? 0)) : NaN;
    return Number.isFinite(rate) ? `${rate.toFixed(rate < 10 ? 1 : 0)} tok/s` : '–';
}

/**
 * All results of all images, a row each, as RFC 4180 has it.
 * @param {string} model
 */
export function csv(model) {
    const rows = pictures.flatMap(({ name, results }) =>
        results.map((result) => [name, model, ...COLUMNS.map((column) => result[column] ?? '')]),
    );
    const lines = [['image', 'model', ...COLUMNS], ...rows].map((row) => row.map(quoted).join(','));
    return `${lines.join('\r\n')}\r\n`;
}

/** @type {(value: string | number) => string} */
function quoted(value) {
    return /[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
}
