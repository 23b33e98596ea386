/**
 * The classes that users see.
 *
 * @typedef {import('../index.d.ts').VisionLanguageModel} Declared
 * @typedef {import('../index.d.ts').LoadOptions} LoadOptions
 * @typedef {import('../index.d.ts').GenerateOptions} GenerateOptions
 * @typedef {import('./layouts.js').VisionProcessor} VisionProcessor
 */

import { AutoConfig, AutoProcessor, AutoTokenizer, RawImage, Tensor, random } from '@huggingface/transformers';

import { beam_search } from './beams.js';
import { Continuation, to_tensor } from './continuation.js';
import { last, nothing, one_by_one } from './generate.js';
import { Progress, load_graphs } from './graphs.js';
import { layout_of } from './layouts.js';
import { check_generate_options, check_keys, follow_prompt, make_plan } from './options.js';
import { check_runtime } from './places.js';
import { turn } from './turn.js';

/** @type {(keyof LoadOptions)[]} */
const LOAD_OPTIONS = ['dtype', 'device', 'revision', 'progress_callback', 'session_options'];

/** A repo that vlm-export made, of any layout, loaded and ready to be run. */
export class VisionLanguageModel {
    /** @type {import('./layouts.js').AnyLayout} */
    #layout;

    /**
     * Loads a repo.
     *
     * @param {string} id on the Hub, or a folder as `from_pretrained` of transformers.js takes it
     * @param {LoadOptions} [options]
     * @returns {Promise<VisionLanguageModel>} of the class that it is called on
     * @throws {TypeError} an unknown option, dtype or graph
     * @throws {Error} a file is missing, the model is of no layout that is known here, or nobody said where the runtime is
     */
    static async from_pretrained(id, options = {}) {
        check_keys('from_pretrained()', options, LOAD_OPTIONS);
        check_runtime();
        const {
            dtype = null,
            device = null,
            revision = 'main',
            progress_callback = null,
            session_options = {},
        } = options;
        const progress = new Progress(progress_callback);
        const files = { revision, progress_callback: progress.report };
        const config = await AutoConfig.from_pretrained(id, files);
        const Layout = layout_of(config);
        const [tokenizer, processor, loaded] = await Promise.all([
            AutoTokenizer.from_pretrained(id, files),
            AutoProcessor.from_pretrained(id, files),
            load_graphs(id, Layout, config, { dtype, device, revision, session_options, progress }),
        ]);
        return new this(
            new Layout({ config, tokenizer, processor: /** @type {VisionProcessor} */ (processor), ...loaded }),
        );
    }

    /**
     * Use `from_pretrained`.
     * @param {import('./layouts.js').AnyLayout} layout
     */
    constructor(layout) {
        this.#layout = layout;
    }

    /** @returns {Declared['layout']} */
    get layout() {
        return this.#layout.name;
    }

    /** Whether `generate()` takes a prompt. */
    get takes_prompt() {
        return this.#layout.takes_prompt;
    }

    /** Whether the decoder continues the image's features, as a text that would stand before the prompt. */
    get prefix_conditioning() {
        return this.#layout.prefix_conditioning;
    }

    /** config.json @returns {Declared['config']} */
    get config() {
        return this.#layout.config;
    }

    /**
     * generation_config.json: what `generate()` does unless it is told otherwise.
     * @returns {Declared['generation_config']}
     */
    get generation_config() {
        return this.#layout.generation_config;
    }

    /** @returns {Declared['tokenizer']} */
    get tokenizer() {
        return this.#layout.tokenizer;
    }

    /** @returns {Declared['processor']} */
    get processor() {
        return this.#layout.processor;
    }

    /** That of all graphs, or by their names where they differ. @returns {Declared['dtype']} */
    get dtype() {
        return of_all(this.#layout.graphs, 'dtype');
    }

    /** That of all graphs, or by their names where they differ. @returns {Declared['device']} */
    get device() {
        return of_all(this.#layout.graphs, 'device');
    }

    /**
     * Runs the vision tower on one image.
     *
     * @param {RawImage | string | URL | Blob | Tensor} image or its pixel_values `[1, 3, height, width] float32`
     * @returns {Promise<Tensor>} `[1, patches, hidden] float32`; where a graph has tower and projection in one, which
     *     is in layouts captioner and chat, what `project_vision_features` would make of it. The tiles of one image,
     *     where a model takes tiles, are the first dimension.
     */
    async encode_image(image) {
        const asked = is_tensor(image) ? { images: [], pixel_values: image } : { images: [await RawImage.read(image)] };
        return await this.#layout.encode(await this.#layout.pixels(asked));
    }

    /**
     * Takes the tower's output to the decoder's width.
     *
     * @param {Tensor} features what `encode_image` gave
     * @returns {Promise<Tensor>} `[1, tokens, decoder_hidden] float32`: the same tensor in layouts captioner and chat, whose
     *     tower has the projection in it
     */
    async project_vision_features(features) {
        return await this.#layout.project(features);
    }

    /**
     * Runs the decoder once.
     *
     * @param {object} inputs
     * @param {Tensor | number[][]} inputs.input_ids `[batch, tokens] int64`. Without a past the prompt: in layout captioner
     *     the start token, in layout chat with an image token for each row of `image_features`, in layout components
     *     perhaps none; in layout tasks what the answer begins with. Several tokens after a past are for a batch of one.
     * @param {Tensor} [inputs.image_features] what `project_vision_features` gave, `[batch, tokens, decoder_hidden]`; in
     *     every run in layout captioner, in the others only in the one without a past
     * @param {Record<string, Tensor>} [inputs.past_key_values] what the last run gave; it is used up
     * @param {number[][]} [inputs.grids] lines and columns of cells of each image, for models whose images have grids
     * @param {number} [inputs.shift] what the last run gave, for these models
     * @returns {Promise<import('./layouts.js').Run>} logits `[batch, 1, vocabulary] float32` of the last token, the cache,
     *     by the names of the decoder's inputs, and the shift of places
     */
    async forward(inputs) {
        check_keys('forward()', inputs, ['input_ids', 'image_features', 'grids', 'past_key_values', 'shift']);
        const input_ids = is_tensor(inputs.input_ids) ? inputs.input_ids : to_tensor(inputs.input_ids);
        return await this.#layout.run({ ...inputs, input_ids });
    }

    /**
     * Generates texts about an image: greedily, by beam search (`num_beams`) or by sampling (`do_sample`).
     *
     * Options that are not given are what generation_config.json says, else transformers' default. An option that is not
     * known, not possible or without effect is an error.
     *
     * @param {GenerateOptions} [options]
     * @returns {Promise<import('../index.d.ts').Generated>} best first
     */
    async generate(options = {}) {
        check_generate_options(options);
        const started = performance.now();
        const layout = this.#layout;
        const plan = make_plan(options, layout.generation_config);
        const { on_token, signal } = options;
        const prepared = await layout.prepare(await asked_of(options));
        follow_prompt(plan, prepared.token_ids.length);
        /** @type {import('../index.d.ts').Timings} */
        const timings = { first_token_ms: null, total_ms: 0, tokens: 0 };
        /** @type {import('./generate.js').Search['heard']} */
        const heard = async (token_ids) => {
            timings.first_token_ms ??= performance.now() - started;
            timings.tokens = token_ids.length;
            on_token?.({ token_id: last(token_ids), text: this.#text(token_ids, true), tokens: token_ids.length });
            if (on_token || signal) {
                await turn();
            }
        };
        const generator = new random.Random(plan.seed);
        const search = { plan, history: prepared.history, random: () => generator.random(), heard, signal };
        const sequences = await this.#search(prepared, search);
        timings.total_ms = performance.now() - started;
        const generated = sequences.map((sequence) => ({ ...sequence, text: this.#text(sequence.token_ids) }));
        return Object.assign(generated, { timings });
    }

    /**
     * @param {import('./layouts.js').Prepared} prepared
     * @param {Omit<import('./generate.js').Search, 'run'>} search
     */
    async #search(prepared, search) {
        if (search.signal?.aborted) {
            return nothing(search.plan);
        }
        const run = await Continuation.begin(this.#layout, prepared);
        try {
            return await (search.plan.num_beams > 1 ? beam_search : one_by_one)({ ...search, run });
        } finally {
            run.release();
        }
    }

    /**
     * @param {number[]} token_ids
     * @param {boolean} [going_on] a letter at the end may not be whole yet
     */
    #text(token_ids, going_on = false) {
        if (!token_ids.length) {
            return '';
        }
        const text = this.#layout.decode(token_ids).trim();
        return going_on ? text.replace(/\uFFFD+$/, '') : text;
    }

    /** Frees the sessions. Nothing can be run afterwards. */
    async dispose() {
        await Promise.all(Object.values(this.#layout.graphs).map((graph) => graph.dispose()));
    }
}

/** A prefix-conditioning model: a decoder that continues the projected features of an image. */
export class PrefixConditioningVLM extends VisionLanguageModel {
    /**
     * As `VisionLanguageModel.from_pretrained`.
     * @param {string} id
     * @param {LoadOptions} [options]
     * @throws {Error} the repo holds another kind of model
     */
    static async from_pretrained(id, options = {}) {
        const model = await super.from_pretrained(id, options);
        if (!model.prefix_conditioning) {
            await model.dispose();
            throw new Error(`${id}: not a prefix-conditioning model: load it with VisionLanguageModel`);
        }
        return model;
    }
}

/**
 * @param {GenerateOptions} options
 * @returns {Promise<import('./layouts.js').Asked>}
 */
async function asked_of({ image, images = image === undefined ? [] : [image], pixel_values, prompt, messages }) {
    return { images: await Promise.all(images.map((one) => RawImage.read(one))), pixel_values, prompt, messages };
}

/**
 * @param {Record<string, import('./graphs.js').Graph>} graphs
 * @param {'dtype' | 'device'} property
 * @returns {string | Record<string, string>} a graph's property, or by the graphs' names where they differ
 */
function of_all(graphs, property) {
    const values = Object.entries(graphs).map(([name, graph]) => [name, graph[property]]);
    return new Set(values.map(([, value]) => value)).size === 1 ? values[0][1] : Object.fromEntries(values);
}

/**
 * @param {unknown} value
 * @returns {value is Tensor}
 */
function is_tensor(value) {
    return value instanceof Tensor;
}
