/**
 * The model in its worker. Another dtype or device is another `Engine`: only the end of a worker gives back the memory
 * of the WASM runtime.
 *
 * @typedef {import('./worker.js').Settings} Settings
 * @typedef {import('./worker.js').Loaded} Loaded
 * @typedef {import('./worker.js').Token} Token
 * @typedef {import('./worker.js').Answer} Answer
 * @typedef {import('./worker.js').Request} Request
 * @typedef {{
 *     resolve: (result: Loaded | Answer) => void, reject: (error: Error) => void, hear: (news: number | Token) => void,
 * }} Waiting
 */

/** A failure in words that say what to do. */
export class Trouble extends Error {}

export class Engine {
    /** @type {Worker} */
    #worker;
    /** @type {Settings} */
    #settings;
    /** @type {Waiting | null} */
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
     * @template {number | Token} News
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
            this.#waiting?.hear('bytes' in reply ? reply.bytes : reply.token);
        }
    }

    /** @param {string} message */
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
