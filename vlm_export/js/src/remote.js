/**
 * A model in a worker, used from a page: the page answers while it generates, and loads no runtime of its own.
 *
 * @typedef {import('../remote.d.ts').WorkerLoadOptions} LoadOptions
 * @typedef {import('../remote.d.ts').WorkerGenerateOptions} GenerateOptions
 * @typedef {import('../remote.d.ts').WorkerModel} Declared
 * @typedef {import('../index.d.ts').Generated} Generated
 * @typedef {import('../index.d.ts').TokenReport} TokenReport
 * @typedef {import('@huggingface/transformers').ProgressInfo} ProgressInfo
 * @typedef {Pick<Declared, 'layout' | 'takes_prompt' | 'prefix_conditioning' | 'generation_config' | 'dtype' | 'device'>} Facts
 * @typedef {{ sequences: import('../index.d.ts').Sequence[], timings: Generated['timings'] }} Answer
 * @typedef {{ number: number } & (
 *     { load: [string, LoadOptions] } | { generate: GenerateOptions } | { stop: true } | { dispose: true }
 * )} Request  `number` is that of the call that it begins, or stops.
 * @typedef {{ number: number } & (
 *     { done: Facts | Answer | undefined } | { error: { name: string, message: string } }
 *     | { token: TokenReport } | { progress: ProgressInfo }
 * )} Reply
 * @typedef {{
 *     resolve: (done: any) => void, reject: (error: Error) => void,
 *     on_token?: (token: TokenReport) => void, on_progress?: ((progress: ProgressInfo) => void) | null,
 * }} Call
 * @typedef {Pick<Call, 'on_token' | 'on_progress'>} Listeners
 */

const ENDED = 'it was ended';

export class WorkerModel {
    /** @type {Link} */
    #link;
    /** @type {Facts} */
    #facts;

    /**
     * Loads a repo in a worker, whose script calls `answer()` of `vlm-export/worker`.
     *
     * @param {Worker} worker which serves this model alone
     * @param {string} id on the Hub, or below the folder that the worker's `load_from` names
     * @param {LoadOptions} [options] as those of `VisionLanguageModel.from_pretrained`
     * @returns {Promise<WorkerModel>}
     * @throws {Error} what went wrong in the worker
     */
    static async from_pretrained(worker, id, options = {}) {
        const link = new Link(worker);
        const { progress_callback, ...sent } = options;
        return new WorkerModel(link, await link.call({ load: [id, sent] }, { on_progress: progress_callback }));
    }

    /**
     * Use `from_pretrained`.
     * @param {Link} link
     * @param {Facts} facts
     */
    constructor(link, facts) {
        this.#link = link;
        this.#facts = facts;
    }

    get layout() {
        return this.#facts.layout;
    }

    get takes_prompt() {
        return this.#facts.takes_prompt;
    }

    get prefix_conditioning() {
        return this.#facts.prefix_conditioning;
    }

    get generation_config() {
        return this.#facts.generation_config;
    }

    get dtype() {
        return this.#facts.dtype;
    }

    get device() {
        return this.#facts.device;
    }

    /**
     * As `VisionLanguageModel.generate`, of images that can be sent: files, and addresses, relative to the page.
     *
     * @param {GenerateOptions} [options]
     * @returns {Promise<Generated>}
     */
    async generate(options = {}) {
        const { on_token, signal, image, images, ...sent } = options;
        const request = {
            generate: {
                ...sent,
                ...(image !== undefined && { image: sendable(image) }),
                ...(images !== undefined && { images: images.map(sendable) }),
            },
        };
        const { sequences, timings } = await this.#link.call(request, { on_token }, signal);
        return Object.assign(sequences, { timings });
    }

    /** Frees the model and ends the worker, which alone gives back the runtime's memory. */
    async dispose() {
        await this.#link.call({ dispose: true });
        this.#link.end();
    }
}

/** Calls to a worker, and its answers. */
class Link {
    #worker;
    #count = 0;
    #ended = false;
    /** @type {Map<number, Call>} */
    #calls = new Map();

    /** @param {Worker} worker */
    constructor(worker) {
        this.#worker = worker;
        worker.addEventListener('message', ({ data }) => this.#hear(data));
        worker.addEventListener('error', ({ message }) => this.#fail(message || 'its script cannot be loaded'));
    }

    /**
     * @param {{ load: [string, LoadOptions] } | { generate: GenerateOptions } | { dispose: true }} request
     * @param {Listeners} [listeners]
     * @param {AbortSignal} [signal]
     * @returns {Promise<any>} what the worker answers to such a request
     */
    call(request, listeners = {}, signal) {
        if (this.#ended) {
            return Promise.reject(failure(ENDED));
        }
        const number = this.#count++;
        const stop = () => this.#worker.postMessage({ number, stop: true });
        return new Promise((resolve, reject) => {
            this.#calls.set(number, { resolve, reject, ...listeners });
            this.#worker.postMessage({ number, ...request });
            signal?.aborted ? stop() : signal?.addEventListener('abort', stop, { once: true });
        }).finally(() => signal?.removeEventListener('abort', stop));
    }

    end() {
        this.#ended = true;
        this.#worker.terminate();
        this.#fail(ENDED);
    }

    /** @param {Reply} reply */
    #hear(reply) {
        const call = this.#calls.get(reply.number);
        if ('token' in reply) {
            call?.on_token?.(reply.token);
        } else if ('progress' in reply) {
            call?.on_progress?.(reply.progress);
        } else {
            this.#calls.delete(reply.number);
            'error' in reply ? call?.reject(revived(reply.error)) : call?.resolve(reply.done);
        }
    }

    /** @param {string} why */
    #fail(why) {
        for (const { reject } of this.#calls.values()) {
            reject(failure(why));
        }
        this.#calls.clear();
    }
}

/** @type {(why: string) => Error} */
function failure(why) {
    return new Error(`the worker failed: ${why}`);
}

/** @type {(error: { name: string, message: string }) => Error} */
function revived({ name, message }) {
    return name === 'TypeError' ? new TypeError(message) : new Error(message);
}

/** The worker's addresses are relative to its script. @type {(image: string | URL | Blob) => string | Blob} */
function sendable(image) {
    if (image instanceof Blob) {
        return image;
    }
    if (typeof image !== 'string' && !(image instanceof URL)) {
        throw new TypeError('image: to a worker goes a Blob or an address; make a RawImage into one with toBlob()');
    }
    return new URL(image, document.baseURI).href;
}
