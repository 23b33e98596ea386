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
        this.#worker.onerror = (event) => this.#fail(event.message ?? 'the worker could not start', null);
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
            this.#fail(error.message, error.missing);
        } else if (loaded ?? answer) {
            this.#settle()?.resolve(loaded ?? answer);
        } else {
            this.#waiting?.hear(bytes ?? token);
        }
    }

    #fail(message, missing) {
        this.#settle()?.reject(new Trouble(explain(message, missing, this.#settings)));
    }
}

/** @type {(message: string, missing: string | null, settings: Settings) => string} */
function explain(message, missing, { device, dtype }) {
    if (missing) {
        return `A file of the model is missing on the server (${missing}). Export the model again, then reload this page.`;
    }
    if (/failed to fetch|networkerror|load failed/i.test(message)) {
        return 'The server does not answer. Check that it is still running and that you are online, then try again.';
    }
    if (/out of memory|bad_alloc|array buffer allocation|allocation failed/i.test(message)) {
        return `The browser has not enough memory for this model in ${dtype}. Choose a smaller precision, or close other tabs and reload.`;
    }
    if (device === 'webgpu') {
        return `WebGPU could not run this model in ${dtype}: ${message} Switch the runtime to WASM.`;
    }
    return `The model could not be run in ${dtype}: ${message} Try another precision, or reload the page.`;
}
