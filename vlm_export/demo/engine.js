/**
 * The model in its worker. Another dtype or device is another `Engine`: only the end of a worker gives back the memory
 * of the WASM runtime.
 *
 * @typedef {import('./worker.js').Settings} Settings
 * @typedef {import('./worker.js').Loaded} Loaded
 * @typedef {import('./worker.js').Token} Token
 * @typedef {import('./worker.js').Answer} Answer
 * @typedef {import('./worker.js').Request} Request
 * @typedef {{ part: import('./worker.js').Part, bytes: number }} Arrived  Since the last one.
 * @typedef {{
 *     resolve: (result: Loaded | Answer) => void, reject: (error: Error) => void, hear: (news: Arrived | Token) => void,
 * }} Waiting
 */

import { LOCAL } from './facts.js';

/** A failure in words that say what to do. */
export class Trouble extends Error {}

/**
 * Why something cannot be fetched: whether this page's own server still answers.
 * @returns {Promise<Trouble | null>} null if it does
 */
export async function server_trouble() {
    try {
        await fetch(new URL('demo.json', import.meta.url), { method: 'HEAD', cache: 'no-store' });
        return null;
    } catch {
        if (LOCAL) {
            return new Trouble('The server of this page has stopped. Run `vlm-export demo` again, then try again.');
        }
        const why = navigator.onLine ? `${location.host} does not answer` : 'This device is offline';
        return new Trouble(`${why}. What is not loaded yet has to wait for it: try again later.`);
    }
}

export class Engine {
    /** @type {Worker} */
    #worker;
    /** @type {Settings} */
    #settings;
    /** @type {Waiting | null} */
    #waiting = null;

    /**
     * @param {Settings} settings
     * @param {boolean} is_single whether one graph says a whole caption
     */
    constructor(settings, is_single) {
        this.#settings = settings;
        const script = is_single ? 'single.js' : 'worker.js';
        this.#worker = new Worker(new URL(script, import.meta.url), { type: 'module' });
        this.#worker.onmessage = ({ data }) => this.#hear(data);
        this.#worker.onerror = (event) => this.#fail(event.message ?? 'its worker did not start.');
    }

    /**
     * @param {(arrived: Arrived) => void} on_bytes
     * @returns {Promise<Loaded>}
     */
    load(on_bytes) {
        return this.#ask({ load: this.#settings }, on_bytes);
    }

    /**
     * @param {import('./worker.js').Question} question
     * @param {(token: Token) => void} on_token
     * @returns {Promise<Answer>}
     */
    generate(question, on_token) {
        return this.#ask({ generate: question }, on_token);
    }

    /** Ends generation after the token at hand; its answer is what there is until then. */
    stop() {
        this.#worker.postMessage({ stop: true });
    }

    /** Whatever is awaited of it fails with `AbortError`. */
    close() {
        this.#worker.terminate();
        this.#settle()?.reject(new DOMException('closed', 'AbortError'));
    }

    /**
     * @template {Loaded | Answer} Result
     * @template {Arrived | Token} News
     * @param {Request} request whose result and news are of these types
     * @param {(news: News) => void} hear
     * @returns {Promise<Result>}
     */
    #ask(request, hear) {
        return new Promise((resolve, reject) => {
            this.#waiting = /** @type {Waiting} */ ({ resolve, reject, hear });
            this.#worker.postMessage(request);
        });
    }

    #settle() {
        const waiting = this.#waiting;
        this.#waiting = null;
        return waiting;
    }

    /** @param {import('./worker.js').Reply} reply */
    #hear(reply) {
        if ('error' in reply) {
            this.#fail(reply.error);
        } else if ('loaded' in reply) {
            this.#settle()?.resolve(reply.loaded);
        } else if ('answer' in reply) {
            this.#settle()?.resolve(reply.answer);
        } else {
            this.#waiting?.hear('bytes' in reply ? reply : reply.token);
        }
    }

    /** @param {string} message */
    async #fail(message) {
        const waiting = this.#settle();
        waiting?.reject((await server_trouble()) ?? new Trouble(explain(message, this.#settings)));
    }
}

/** @type {(message: string, settings: Settings) => string} */
function explain(message, { device, dtype }) {
    if (/is not there|not found|could not locate/i.test(message)) {
        return `The server lacks a file of the model. ${message}. Export the model again, then reload this page.`;
    }
    if (/failed to fetch|networkerror|load failed/i.test(message)) {
        return `A file of the model did not come whole: ${message}. Try again.`;
    }
    if (/out of memory|bad_alloc|allocation failed/i.test(message)) {
        return `There is not enough memory for this model in ${dtype}. Choose a smaller precision, or close other tabs.`;
    }
    const next = device === 'webgpu' ? 'Set the runtime to WASM' : 'Choose another precision';
    return `The model does not run in ${dtype} here. ${message} ${next}, or reload the page.`;
}
