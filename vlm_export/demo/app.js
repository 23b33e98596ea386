/**
 * The page: when the model is loaded, what is captioned, and what is shown of it.
 *
 * @typedef {import('./facts.js').Facts} Facts
 * @typedef {import('./results.js').Picture} Picture
 * @typedef {import('./results.js').Result} Result
 */

import { chosen, note, offer_choices } from './choices.js';
import { $ } from './dom.js';
import { Engine, Trouble, server_trouble } from './engine.js';
import { LOCAL, megabytes, takes_prompt } from './facts.js';
import { arriving, connect } from './picture.js';
import { add, keep, pictures, show, shown, speed, thumbnail } from './results.js';
import { connect_sharing, show_code } from './share.js';

/** @type {Facts} */
let facts;
/** @type {{ engine: Engine, ready: ReturnType<typeof start>, key: string } | null} */
let current = null;
/** @type {'idle' | 'loading' | 'generating'} */
let phase = 'idle';
/** The run at hand, or the last one. */
let work = Promise.resolve();

const prompt = () => (takes_prompt(facts) ? $('#prompt', HTMLTextAreaElement).value.trim() : null);

/** @param {unknown} error */
async function show_error(error) {
    const failure = error instanceof Trouble ? error : await cause(error);
    $('#error').textContent = failure.message;
    $('#error').hidden = false;
}

/** @type {(error: unknown) => Promise<Trouble>} */
async function cause(error) {
    const what = /** @type {Partial<Error> | undefined} */ (error)?.message ?? String(error);
    const trouble = await server_trouble();
    if (!trouble) {
        console.error(error);
    }
    return trouble ?? new Trouble(`Something went wrong: ${what}. Reload the page to try again.`);
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
    const { device, dtype } = chosen();
    const settings = { device, dtype, caches: { model: facts.cache, runtime: facts.runtime.cache } };
    const key = JSON.stringify(settings);
    if (current?.key !== key) {
        current?.engine.close();
        const engine = new Engine(settings, facts.layout === 'single');
        current = { key, engine, ready: start(engine, settings.dtype) };
    }
    return current.ready;
}

/** @type {(engine: Engine, dtype: string) => Promise<{ engine: Engine } & import('./engine.js').Loaded>} */
async function start(engine, dtype) {
    const totals = { model: facts.download_bytes[dtype], runtime: facts.runtime.bytes };
    const come = { model: 0, runtime: 0 };
    /** @param {import('./engine.js').Arrived} arrived */
    const report = ({ part, bytes }) => {
        come[part] = Math.min(come[part] + bytes, totals[part]);
        const open = come.model < totals.model ? 'model' : 'runtime';
        const words = `Loading the ${open}: ${megabytes(come[open])} of ${megabytes(totals[open])}`;
        const share = (come.model + come.runtime) / (totals.model + totals.runtime);
        progress(share, share < 1 ? words : 'Starting');
    };
    report({ part: 'model', bytes: 1 });
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
    load().catch((error) => (was_stopped(error) ? undefined : show_error(error)));
}

/** @param {typeof phase} value */
function set_phase(value) {
    phase = value;
    $('#run').textContent = phase === 'idle' ? (takes_prompt(facts) ? 'Ask' : 'Caption') : 'Stop';
    $('#caption').setAttribute('aria-busy', String(phase !== 'idle'));
    $('#run-all').textContent = `All ${pictures.length} images`;
    $('#run-all').hidden = phase !== 'idle' || pictures.length < 2;
}

function forget_error() {
    $('#error').hidden = true;
}

function clear() {
    $('#others').hidden = true;
    $('#of-caption').hidden = true;
    $('#reference').textContent = '';
    show_caption('');
    show_figures({});
}

/** @param {string} text */
function show_caption(text) {
    $('#caption').textContent = text;
}

/** @param {Partial<Pick<Result, 'first_token_ms' | 'total_ms' | 'tokens' | 'score'>>} figures */
function show_figures({ first_token_ms = null, total_ms = 0, tokens = 0, score = null }) {
    $('#first').textContent = first_token_ms ? `${Math.round(first_token_ms)} ms` : '–';
    $('#speed').textContent = speed({ first_token_ms, total_ms, tokens });
    $('#tokens').textContent = String(tokens || '–');
    $('#score').textContent = score === null ? '–' : score.toFixed(3);
}

/** Ends what is under way and waits for its end. */
async function stop() {
    if (phase === 'generating' && facts.layout === 'single') {
        current?.engine.close(); // one run, which only the end of its worker ends
        current = null;
    } else if (phase === 'generating') {
        current?.engine.stop();
    } else if (phase === 'loading') {
        current?.engine.close();
    }
    await work;
}

/**
 * Captions the images that are asked for, one after the other; by default the one on the stage.
 * @param {Picture[]} [wanted]
 */
async function run(wanted) {
    await Promise.all([arriving, stop()]);
    clear();
    const now = wanted ?? (shown ? [shown] : []);
    if (now.length) {
        work = answer(now);
    } else {
        show_error(new Trouble('There is no image yet: choose one, drop it here, paste it, or use the camera.'));
        $('#drop').focus();
    }
}

/** Scrolls to the image with its caption, or to the caption alone where both do not fit. */
function into_sight() {
    const { top } = $('#stage').getBoundingClientRect();
    const { bottom } = $('#caption').getBoundingClientRect();
    if (bottom - top > innerHeight) {
        $('#caption').scrollIntoView({ block: 'nearest' });
    } else if (top < 0 || bottom > innerHeight) {
        $('#stage').scrollIntoView();
    }
}

/** Never fails: what goes wrong is shown. @type {(wanted: Picture[]) => Promise<void>} */
async function answer(wanted) {
    try {
        set_phase('loading');
        into_sight();
        const { engine, max_new_tokens } = await load();
        set_phase('generating');
        for (const picture of wanted) {
            progress(0.01, 'Looking at the image');
            if (picture !== shown) {
                await on_stage(picture);
            }
            if (await generate(engine, max_new_tokens, picture)) {
                break;
            }
        }
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

/** @type {(engine: Engine, max_new_tokens: number, picture: Picture) => Promise<boolean>} whether it was stopped */
async function generate(engine, max_new_tokens, picture) {
    const settings = { ...chosen(), prompt: prompt() };
    const { num_beams } = settings;
    const started = performance.now();
    let first_token_ms = 0;
    const question = { image: picture.image, prompt: settings.prompt, num_beams };
    const { sequences, stopped, ...timings } = await engine.generate(question, ({ text, tokens }) => {
        const total_ms = performance.now() - started;
        first_token_ms ||= total_ms;
        show_caption(text);
        show_figures({ first_token_ms, total_ms, tokens });
        progress(tokens / max_new_tokens, 'Generating');
    });
    const [best, ...others] = sequences;
    const result = { ...settings, ...timings, ...best };
    show_result(result, picture);
    show_others(others);
    progress(0, stopped ? 'Stopped' : 'Done');
    if (!stopped) {
        add(picture, result);
    }
    return stopped;
}

/** @type {(result: Result, picture: Picture) => void} */
function show_result(result, picture) {
    show_caption(result.text);
    show_figures(result);
    $('#of-caption').hidden = !result.text;
    compare(result, picture);
}

/** @param {import('./worker.js').Answer['sequences']} sequences */
function show_others(sequences) {
    const items = sequences.map(({ text, score }) => {
        const item = Object.assign(document.createElement('li'), { textContent: text });
        item.append(Object.assign(document.createElement('small'), { textContent: ` ${score?.toFixed(3) ?? ''}` }));
        return item;
    });
    $('#others ol').replaceChildren(...items);
    $('#others').hidden = !items.length;
}

/**
 * Beside what PyTorch says to the same image and prompt, where that was recorded.
 * @type {(result: Result, picture: Picture) => void}
 */
function compare({ text, prompt, num_beams }, { sample }) {
    if (sample?.caption && num_beams === 1 && (prompt ?? '') === (takes_prompt(facts) ? facts.prompt : '')) {
        const same = sample.caption.trim() === text.trim();
        $('#reference').textContent = same ? 'PyTorch says the same.' : `PyTorch says: ${sample.caption}`;
    }
}

/** Puts an image on the stage, with what was said of it last. @type {(picture: Picture) => Promise<void>} */
async function on_stage(picture) {
    clear();
    const last = picture.results.at(-1);
    if (last) {
        show_result(last, picture);
    }
    const index = picture.sample ? facts.samples.indexOf(picture.sample) : -1;
    document.querySelectorAll('#samples button').forEach((button, place) => {
        button.ariaPressed = String(place === index);
    });
    await show(picture, (other) => stop().then(() => on_stage(other)));
}

/**
 * A captioner starts at once; in a chat there is something to ask first.
 * @type {(given: import('./results.js').Given[]) => Promise<void>}
 */
async function on_images(given) {
    forget_error();
    const kept = keep(given);
    await stop();
    await on_stage(kept[0]);
    set_phase('idle');
    if (takes_prompt(facts)) {
        $('#prompt').focus();
    } else {
        await run(kept);
    }
}

/** @param {(sample: import('./facts.js').Sample, name: string) => void} take */
function show_samples(take) {
    const items = facts.samples.map((sample, index) => {
        const name = sample.caption ?? `Sample ${index + 1}`;
        return thumbnail(sample.file, name, false, () => take(sample, name));
    });
    $('#samples ul').append(...items);
    $('#samples').hidden = !items.length;
}

function show_licences() {
    const items = facts.licences.map(({ of, name, address }) => {
        const item = document.createElement('li');
        const words = `${of}: ${name}`;
        item.append(address ? link(address, words) : words);
        return item;
    });
    $('#licences').replaceChildren(...items);
}

/** @type {(address: string, words: string) => HTMLAnchorElement} */
function link(address, words) {
    const made = { href: address, textContent: words, target: '_blank', rel: 'noopener' };
    return Object.assign(document.createElement('a'), made);
}

function on_settings() {
    forget_error();
    show_code(facts, chosen(), prompt() ?? '');
    if (shown && !takes_prompt(facts)) {
        run();
    } else if (LOCAL) {
        preload();
    }
}

function connect_form() {
    $('#form').addEventListener('submit', (event) => {
        event.preventDefault();
        forget_error();
        phase === 'idle' ? run() : stop();
    });
    $('#run-all').addEventListener('click', () => {
        forget_error();
        run([...pictures]);
    });
    $('#settings').addEventListener('change', on_settings);
    $('#prompt').addEventListener('input', () => show_code(facts, chosen(), prompt() ?? ''));
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
    document.title = facts.name;
    document.body.dataset.layout = facts.layout;
    $('#name').textContent = facts.name;
    if (facts.home) {
        Object.assign($('#home', HTMLAnchorElement), { href: facts.home.address, textContent: facts.home.repo_id });
        $('#home').hidden = false;
    }
    $('#prompt', HTMLTextAreaElement).value = facts.prompt;
    $('#prompt-field').hidden = !takes_prompt(facts);
    await offer_choices(facts);
    set_phase('idle');
    show_samples(connect(on_images, show_error));
    show_licences();
    show_code(facts, chosen(), prompt() ?? '');
    connect_sharing(facts, show_error);
    connect_form();
    if (LOCAL) {
        preload();
    }
}

open()
    .catch(show_error)
    .finally(() => $('#main').removeAttribute('data-opening'));
