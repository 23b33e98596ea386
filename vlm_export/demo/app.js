/**
 * The page: what can be chosen, when the model is loaded, and what is shown of what it does.
 *
 * @typedef {import('./worker.js').Device} Device
 * @typedef {import('./worker.js').Answer} Answer
 * @typedef {{ file: string, caption: string | null }} Sample  The caption is what PyTorch says, to the prompt.
 * @typedef {{
 *     name: string, layout: 'captioner' | 'chat' | 'components', download_bytes: Record<string, number>,
 *     preferred: Record<Device, string[]>, failed: string[],
 *     runtime_bytes: number, cache: string | null, prompt: string, samples: Sample[],
 *     home: { repo_id: string, address: string } | null,
 * }} Facts  demo.json.
 * @typedef {{ value: string, text: string, detail?: string, reason?: string | null }} Option  `reason` says why it
 *     cannot be chosen.
 */

import { $ } from './dom.js';
import { Engine, Trouble } from './engine.js';
import { arriving, connect } from './picture.js';

const BEAMS = [1, 2, 3, 4, 5];
const LOCAL = ['127.0.0.1', 'localhost', '[::1]'].includes(location.hostname);

/** @type {Facts} */
let facts;
/** @type {Blob | null} */
let image = null;
/** The sample that the image is, if it is one. @type {Sample | null} */
let sample = null;
/** @type {{ engine: Engine, ready: ReturnType<typeof start>, key: string } | null} */
let current = null;
/** @type {'idle' | 'loading' | 'generating'} */
let phase = 'idle';
/** The run at hand, or the last one. */
let work = Promise.resolve();
/** @type {{ missing: string | null, half: boolean }} why there is none, and whether it computes in float16 */
let webgpu = { missing: null, half: false };

/** @type {(name: string) => boolean} */
const is_chosen = (name) => document.querySelector(`input[name=${name}]:checked`) !== null;
/** @type {(name: string) => string} */
const chosen = (name) => $(`input[name=${name}]:checked`, HTMLInputElement).value;
const chosen_device = () => /** @type {Device} */ (chosen('device'));
const takes_prompt = () => facts.layout !== 'captioner';

/** A row of radio buttons. @type {(name: string, options: Option[]) => void} */
function offer(name, options) {
    const before = is_chosen(name) ? chosen(name) : null;
    const labels = options.map(({ value, text, detail, reason }) => {
        const label = document.createElement('label');
        const input = Object.assign(document.createElement('input'), { type: 'radio', name, value });
        input.disabled = Boolean(reason);
        input.checked = value === before && !reason;
        const words = document.createElement('span');
        words.append(text);
        if (detail) {
            words.append(Object.assign(document.createElement('small'), { textContent: detail }));
        }
        label.append(input, words);
        label.title = reason ?? '';
        return label;
    });
    $(`#${name}`).replaceChildren($(`#${name} legend`), ...labels);
}

/** @type {(name: string, value: string) => void} */
function pick(name, value) {
    $(`input[name=${name}][value="${value}"]`, HTMLInputElement).checked = true;
}

/** @type {(bytes: number) => string} */
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;

/** @returns {Promise<typeof webgpu>} */
async function look_for_webgpu() {
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
    const passed = there.filter((dtype) => !facts.failed.includes(dtype));
    return [...facts.preferred[device].filter((dtype) => passed.includes(dtype)), ...passed, ...there];
}

function offer_dtypes() {
    const device = chosen_device();
    const options = Object.entries(facts.download_bytes).map(([dtype, bytes]) => ({
        value: dtype,
        text: dtype,
        detail: megabytes(bytes) + (facts.failed.includes(dtype) ? ', failed verification' : ''),
        reason: obstacle(dtype, device),
    }));
    offer('dtype', options);
    if (!is_chosen('dtype')) {
        pick('dtype', usable(device)[0]);
    }
}

/**
 * Says below the choices why one of them is off, and how many threads there are.
 * @param {number} [threads]
 */
function note(threads) {
    const device = chosen_device();
    const lines = webgpu.missing ? [`No WebGPU: ${webgpu.missing}.`] : [];
    if (!crossOriginIsolated) {
        lines.push('WASM: 1 thread; more need headers (COOP, COEP) that this site does not send.');
    } else if (threads && device === 'wasm') {
        lines.push(`WASM: ${threads === 1 ? '1 thread' : `${threads} threads`}.`);
    }
    const dtypes = Object.keys(facts.download_bytes);
    for (const reason of new Set(dtypes.map((dtype) => obstacle(dtype, device)))) {
        if (reason) {
            lines.push(`${dtypes.filter((dtype) => obstacle(dtype, device) === reason).join(', ')}: ${reason}.`);
        }
    }
    $('#note').textContent = lines.join(' ');
}

/** @param {unknown} error */
function show_error(error) {
    if (!(error instanceof Trouble)) {
        console.error(error);
    }
    const what = /** @type {Partial<Error> | undefined} */ (error)?.message ?? String(error);
    $('#error').textContent =
        error instanceof Trouble ? what : `Something went wrong: ${what}. Reload the page to try again.`;
    $('#error').hidden = false;
}

/** @type {(error: unknown) => boolean} */
const was_stopped = (error) => error instanceof DOMException && error.name === 'AbortError';

/**
 * @param {number} share of what is being waited for, of 1; 0 for nothing
 * @param {string} words
 */
function progress(share, words) {
    const bar = $('#progress', HTMLProgressElement);
    bar.value = share;
    bar.classList.toggle('on', share > 0);
    $('#status').textContent = words;
}

/** @returns {ReturnType<typeof start>} in the chosen precision, loaded once */
function load() {
    const settings = { device: chosen_device(), dtype: chosen('dtype'), cache: facts.cache };
    const key = JSON.stringify(settings);
    if (current?.key !== key) {
        current?.engine.close();
        const engine = new Engine(settings);
        current = { key, engine, ready: start(engine, settings.dtype) };
    }
    return current.ready;
}

/** @type {(engine: Engine, dtype: string) => Promise<{ engine: Engine } & import('./engine.js').Loaded>} */
async function start(engine, dtype) {
    const total = facts.download_bytes[dtype] + facts.runtime_bytes;
    let bytes = 0;
    /** @param {number} more */
    const report = (more) => {
        bytes = Math.min(bytes + more, total);
        progress(bytes / total, bytes < total ? `Loading ${megabytes(bytes)} of ${megabytes(total)}` : 'Starting');
    };
    report(1);
    try {
        const loaded = await engine.load(report);
        progress(0, 'Ready');
        note(loaded.threads);
        return { engine, ...loaded };
    } catch (error) {
        progress(0, '');
        if (current?.engine === engine) {
            current = null;
        }
        engine.close();
        throw error;
    }
}

/** Loads before there is anything to caption. */
function preload() {
    load().catch((error) => was_stopped(error) || show_error(error));
}

/** @param {typeof phase} value */
function set_phase(value) {
    phase = value;
    $('#run').textContent = phase === 'idle' ? (takes_prompt() ? 'Ask' : 'Caption') : 'Stop';
    $('#caption').setAttribute('aria-busy', String(phase !== 'idle'));
}

function clear() {
    $('#error').hidden = true;
    $('#others').hidden = true;
    $('#reference').textContent = '';
    show_caption('');
    show_figures({});
}

/** @param {string} text */
function show_caption(text) {
    $('#caption').textContent = text;
}

/** @param {Partial<Answer>} answer */
function show_figures({ first_token_ms, total_ms = 0, tokens }) {
    const later = (tokens ?? 0) - 1;
    const rate = later > 0 ? (1000 * later) / (total_ms - (first_token_ms ?? 0)) : NaN;
    $('#first').textContent = first_token_ms ? `${Math.round(first_token_ms)} ms` : '–';
    $('#speed').textContent = Number.isFinite(rate) ? `${rate.toFixed(rate < 10 ? 1 : 0)} tok/s` : '–';
    $('#tokens').textContent = String(tokens ?? '–');
}

/** Ends what is under way and waits for its end. */
async function stop() {
    if (phase === 'generating') {
        current?.engine.stop();
    } else if (phase === 'loading') {
        current?.engine.close();
    }
    await work;
}

async function run() {
    await Promise.all([arriving, stop()]);
    clear();
    if (image) {
        work = answer(image, sample);
    } else {
        show_error(new Trouble('There is no image yet: choose one, drop it here, paste it, or use the camera.'));
        $('#drop').focus();
    }
}

/** Never fails: what goes wrong is shown. @type {(image: Blob, sample: Sample | null) => Promise<void>} */
async function answer(image, sample) {
    try {
        set_phase('loading');
        $('#caption').scrollIntoView({ block: 'nearest' });
        const { engine, max_new_tokens } = await load();
        set_phase('generating');
        await generate(engine, max_new_tokens, image, sample);
    } catch (error) {
        const stopped = was_stopped(error);
        progress(0, stopped ? 'Stopped' : '');
        if (!stopped) {
            show_error(error);
        }
    } finally {
        set_phase('idle');
    }
}

/** @type {(engine: Engine, max_new_tokens: number, image: Blob, sample: Sample | null) => Promise<void>} */
async function generate(engine, max_new_tokens, image, sample) {
    const num_beams = Number(chosen('beams'));
    const prompt = takes_prompt() ? $('#prompt', HTMLTextAreaElement).value.trim() : null;
    const started = performance.now();
    let first_token_ms = 0;
    progress(0.01, 'Looking at the image');
    const answer = await engine.generate({ image, prompt, num_beams }, ({ text, tokens }) => {
        const total_ms = performance.now() - started;
        first_token_ms ||= total_ms;
        show_caption(text);
        show_figures({ first_token_ms, total_ms, tokens });
        progress(tokens / max_new_tokens, 'Generating');
    });
    const [best, ...others] = answer.texts;
    show_caption(best);
    show_figures(answer);
    show_others(others);
    progress(0, answer.stopped ? 'Stopped' : 'Done');
    if (!answer.stopped && num_beams === 1) {
        compare(best, prompt, sample);
    }
}

/** @param {string[]} texts */
function show_others(texts) {
    const items = texts.map((text) => Object.assign(document.createElement('li'), { textContent: text }));
    $('#others ol').replaceChildren(...items);
    $('#others').hidden = !texts.length;
}

/**
 * Beside what PyTorch says to the same image and prompt, where that was recorded.
 * @type {(text: string, prompt: string | null, sample: Sample | null) => void}
 */
function compare(text, prompt, sample) {
    if (sample?.caption && (prompt ?? '') === (takes_prompt() ? facts.prompt : '')) {
        const same = sample.caption.trim() === text.trim();
        $('#reference').textContent = same ? 'PyTorch says the same.' : `PyTorch says: ${sample.caption}`;
    }
}

/** @param {(address: string, name: string, sample: Sample) => void} show */
function show_samples(show) {
    const items = facts.samples.map((entry, index) => {
        const name = `Sample ${index + 1}`;
        const button = Object.assign(document.createElement('button'), { type: 'button' });
        button.append(Object.assign(new Image(), { src: entry.file, alt: name }));
        button.addEventListener('click', () => show(entry.file, name, entry));
        const item = document.createElement('li');
        item.append(button);
        return item;
    });
    $('#samples ul').append(...items);
    $('#samples').hidden = !items.length;
}

/**
 * A captioner starts at once; in a chat there is something to ask first.
 * @type {(image: Blob, sample: Sample | null) => void}
 */
function on_image(chosen_image, chosen_sample) {
    [image, sample] = [chosen_image, chosen_sample];
    const shown = $('#image', HTMLImageElement).alt;
    for (const button of document.querySelectorAll('.samples button')) {
        const { alt } = /** @type {HTMLImageElement} */ (button.firstChild);
        button.ariaPressed = String(alt === shown);
    }
    if (takes_prompt()) {
        stop().then(clear);
        $('#prompt').focus();
    } else {
        run();
    }
}

function connect_form() {
    $('#form').addEventListener('submit', (event) => {
        event.preventDefault();
        phase === 'idle' ? run() : stop();
    });
    $('#settings').addEventListener('change', ({ target }) => {
        const { name } = /** @type {HTMLInputElement} */ (target);
        if (name === 'device') {
            offer_dtypes();
            note();
        }
        if (image && !takes_prompt()) {
            run();
        } else if (LOCAL) {
            preload();
        }
    });
    $('#prompt').addEventListener('keydown', (event) => {
        if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            $('#form', HTMLFormElement).requestSubmit();
        }
    });
    addEventListener('keydown', ({ key }) => key === 'Escape' && stop());
}

async function open() {
    facts = await (await fetch('demo.json')).json();
    webgpu = await look_for_webgpu();
    if (!webgpu.missing && !usable('webgpu').length) {
        webgpu.missing = 'this repo has no precision for it';
    }
    document.title = facts.name;
    document.body.dataset.layout = facts.layout;
    $('#name').textContent = facts.name;
    if (facts.home) {
        Object.assign($('#home', HTMLAnchorElement), { href: facts.home.address, textContent: facts.home.repo_id });
        $('#home').hidden = false;
    }
    $('#prompt', HTMLTextAreaElement).value = facts.prompt;
    $('#prompt-field').hidden = !takes_prompt();
    offer('device', [
        { value: 'wasm', text: 'WASM' },
        { value: 'webgpu', text: 'WebGPU', reason: webgpu.missing },
    ]);
    pick('device', 'wasm');
    offer_dtypes();
    offer(
        'beams',
        BEAMS.map((count) => ({ value: String(count), text: String(count) })),
    );
    pick('beams', '1');
    note();
    set_phase('idle');
    show_samples(connect(on_image, show_error));
    connect_form();
    if (LOCAL) {
        preload();
    }
}

open()
    .catch(show_error)
    .finally(() => $('#main').removeAttribute('data-opening'));
