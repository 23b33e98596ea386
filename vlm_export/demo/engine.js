/**
 * The model in its worker. Another dtype or device is another `Engine`: only the end of a worker gives back the memory
 * of the WASM runtime.
 *
 * @typedef {{ device: string, dtype: string, cache: string | null }} Settings
 * @typedef {{ threads: number, max_new_tokens: number }} Loaded
 */

/** A failure in words that say what to do. */
export class Trouble extends Error {}

export class Engine {
    /** @type {Worker} */
    #worker;
    /** @type {Settings} */
    #settings;
    /** @type {{ resolve: (value: any) => void, reject: (error: Error) => void, hear: Function } | null} */
    #waiting = null;

    /** @param {Settings} settings */
    constructor(settings) {
        this.#settings = settings;
        this.#worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
        this.#worker.onmessage = ({ data }) => this.#hear(data);
        this.#worker.onerror = (event) => this.#fail(event.message ?? 'its worker did not start.');
    }

    /**
     * @param {(bytes: number) => void} on_bytes called with what has come since the last call
     * @returns {Promise<Loaded>}
     */
    load(on_bytes) {
        return this.#ask({ load: this.#settings }, on_bytes);
    }

    /**
     * @param {{ image: Blob, prompt: string | null, num_beams: number }} request
     * @param {(token: { text: string, tokens: number }) => void} on_token
     * @returns {Promise<import('./worker.js').Answer>}
     */
    generate(request, on_token) {
        return this.#ask({ generate: request }, on_token);
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

    #ask(request, hear) {
        return new Promise((resolve, reject) => {
            this.#waiting = { resolve, reject, hear };
            this.#worker.postMessage(request);
        });
    }

    #settle() {
        const waiting = this.#waiting;
        this.#waiting = null;
        return waiting;
    }

    #hear({ bytes, token, loaded, answer, error }) {
        if (error) {
            this.#fail(error);
        } else if (loaded ?? answer) {
            this.#settle()?.resolve(loaded ?? answer);
        } else {
            this.#waiting?.hear(bytes ?? token);
        }
    }

    #fail(message) {
        this.#settle()?.reject(new Trouble(explain(message, this.#settings)));
    }
}

/** @type {(message: string, settings: Settings) => string} */
function explain(message, { device, dtype }) {
    if (/is not there|not found|could not locate/i.test(message)) {
        return `The server lacks a file of the model. ${message}. Export the model again, then reload this page.`;
    }
    if (/failed to fetch|networkerror|load failed/i.test(message)) {
        return 'The server does not answer. See that it still runs and that you are online, then try again.';
    }
    if (/out of memory|bad_alloc|allocation failed/i.test(message)) {
        return `There is not enough memory for this model in ${dtype}. Choose a smaller precision, or close other tabs.`;
    }
    const next = device === 'webgpu' ? 'Set the runtime to WASM' : 'Choose another precision';
    return `The model does not run in ${dtype} here. ${message} ${next}, or reload the page.`;
}
