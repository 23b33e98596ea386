/**
 * How the graphs of each layout are fed: one class a layout, all with the same methods.
 *
 * @typedef {import('./graphs.js').Graph} Graph
 * @typedef {import('./cache.js').Cache} Cache
 * @typedef {import('@huggingface/transformers').RawImage} RawImage
 * @typedef {import('@huggingface/transformers').Processor} Processor
 * @typedef {NonNullable<Processor['image_processor']> & { config: { image_processor_type?: string } }} ImageProcessor
 * @typedef {Processor & { image_processor: ImageProcessor, image_token?: string,
 *     task_prompts_without_inputs?: Map<string, string>, task_prompts_with_input?: Map<string, string> }}
 *     VisionProcessor  Of transformers.js: some of its classes say which token stands for an image, others by their config.
 * @typedef {import('../index.d.ts').Layout} LayoutName
 * @typedef {Captioner | Chat | Tasks | Components} AnyLayout
 * @typedef {{ cut: 'whole' | 'tiles' | 'cells' | 'patches' | 'patched tiles', text_first: boolean }} Cutting  What an
 *     image processor makes of pictures, and whether the processor that holds it takes the text before them.
 *
 * @typedef {object} Asked What the caller gave of image and text.
 * @property {RawImage[]} images
 * @property {Tensor} [pixel_values]
 * @property {string} [prompt]
 * @property {import('@huggingface/transformers').Message[]} [messages]
 *
 * @typedef {object} Prepared
 * @property {number[]} token_ids of the prompt, as the decoder is fed them first
 * @property {number[]} history those of them that rules on repetition look back on
 * @property {Tensor} [image_features] in layout tasks, what the text encoder makes of them and the prompt
 * @property {number[][]} [grids] lines and columns of cells of each image, where tokens have places in three axes
 *
 * @typedef {object} RunInputs
 * @property {Tensor} input_ids
 * @property {Tensor} [image_features]
 * @property {number[][]} [grids]
 * @property {Cache} [past_key_values]
 * @property {number} [shift] what the run before gave
 *
 * @typedef {object} Run
 * @property {Tensor} logits `[batch, kept, vocabulary]`, the last position's last
 * @property {Cache} past_key_values
 * @property {number} [shift] what is added to a token's number to give its place, after a prompt with images
 *
 * @typedef {object} Repo
 * @property {Record<string, Graph>} graphs
 * @property {import('@huggingface/transformers').PretrainedConfig & Record<string, any>} config
 * @property {Record<string, any>} generation_config
 * @property {import('@huggingface/transformers').PreTrainedTokenizer} tokenizer
 * @property {VisionProcessor} processor
 */

import { Tensor, cat, ones } from '@huggingface/transformers';

import { copy_rows, empty_cache, next_cache, past_length } from './cache.js';
import { GRID_TYPES, IMAGE_PROCESSORS, MODEL_TYPES, NUMBERED_FROM_ONE, PREFIX, PROCESSORS } from './contract.js';
import { grid_places } from './positions.js';

const DECODER = 'decoder_model_merged';
const NOTHING_WRITTEN = { place: '', before: '', after: '', behind: '', end: '' };

/** A layout: the graphs that it has, and what they are fed. */
class Layout {
    /** Said by each layout. @type {LayoutName | undefined} */
    name;

    /** @param {Repo} repo */
    constructor({ graphs, config, generation_config, tokenizer, processor }) {
        this.graphs = graphs;
        this.config = config;
        this.generation_config = generation_config;
        this.tokenizer = tokenizer;
        this.processor = processor;
    }

    /**
     * Whether the image's features stand before the text without ids of their own. A captioner of that kind looks like a
     * vision-encoder-decoder, or like a llava, but for this key of config.json.
     */
    get prefix_conditioning() {
        return this.config[PREFIX] === true;
    }

    /**
     * @param {Asked} asked
     * @returns {Promise<Record<string, Tensor>>} what the vision tower takes of one image
     */
    async pixels({ images, pixel_values }) {
        if (images.length > 1 || (pixel_values && pixel_values.dims[0] > 1)) {
            throw new TypeError(`layout ${this.name} takes one image, not ${pixel_values?.dims[0] ?? images.length}`);
        }
        if (!images.length && !pixel_values) {
            throw new TypeError(`layout ${this.name} needs an image: give image or pixel_values`);
        }
        return pixel_values ? { pixel_values } : await this.processor(images);
    }

    /**
     * @param {Tensor} features of the vision tower
     * @returns {Promise<Tensor>} as the decoder takes them
     */
    async project(features) {
        return features;
    }

    /**
     * What every further run must be fed of the image, for a batch of another size.
     * @param {Tensor | undefined} image_features
     * @param {number} _batch
     * @returns {Tensor | undefined}
     */
    carry(image_features, _batch) {
        return image_features;
    }

    /**
     * @param {number[]} token_ids
     * @returns {string} the text of generated ids
     */
    decode(token_ids) {
        return this.tokenizer.decode(token_ids, { skip_special_tokens: true });
    }
}

/** `encoder_model` and `decoder_model_merged`: a vision-encoder-decoder, or a prefix-conditioning model that looks so. */
export class Captioner extends Layout {
    static graphs = ['encoder_model', DECODER];
    static decoders = [DECODER];
    name = /** @type {const} */ ('captioner');
    takes_prompt = false;

    /** @param {Record<string, Tensor>} pixels */
    async encode({ pixel_values }) {
        return (await this.graphs.encoder_model.run({ pixel_values })).last_hidden_state;
    }

    /** @param {Asked} asked */
    async prepare(asked) {
        if (asked.prompt !== undefined || asked.messages !== undefined) {
            throw new TypeError('layout captioner takes no prompt: export the model with --layout chat to give it one');
        }
        const start = this.generation_config.decoder_start_token_id;
        if (start === undefined) {
            throw new Error('generation_config.json: decoder_start_token_id is missing');
        }
        // A prefix-conditioning decoder puts the image in the place of the start token, which nobody ever sees.
        const history = this.prefix_conditioning ? [] : [start];
        return { token_ids: [start], history, image_features: await this.encode(await this.pixels(asked)) };
    }

    /**
     * @param {RunInputs} inputs
     * @returns {Promise<Run>}
     */
    async run({ input_ids, image_features, past_key_values }) {
        const past = past_key_values ?? empty_cache(this.graphs[DECODER], input_ids.dims[0]);
        const feeds = { input_ids, encoder_hidden_states: image_features, ...past };
        const outputs = await this.graphs[DECODER].run(feeds);
        return { logits: outputs.logits, past_key_values: next_cache(outputs, past) };
    }

    /**
     * @param {Tensor} image_features
     * @param {number} batch
     */
    carry(image_features, batch) {
        return image_features.dims[0] === batch ? image_features : copy_rows(image_features, Array(batch).fill(0));
    }
}

/** `vision_encoder`, `embed_tokens` and `decoder_model_merged`: features are written over the rows of image tokens. */
export class Chat extends Layout {
    static graphs = ['vision_encoder', 'embed_tokens', DECODER];
    static decoders = [DECODER];
    name = /** @type {const} */ ('chat');
    takes_prompt = true;

    /** @param {Asked} asked */
    async pixels({ images, pixel_values }) {
        return pixel_values ? { pixel_values } : await this.processor.image_processor(images);
    }

    /** @param {Record<string, Tensor>} pixels  Of two names for the grid of patches a graph takes one. */
    async encode(pixels) {
        const { image_features } = await this.graphs.vision_encoder.run({ ...pixels, grid_thw: pixels.image_grid_thw });
        return image_features;
    }

    /**
     * @param {Asked} asked
     * @returns {Promise<Prepared>}
     */
    async prepare(asked) {
        const ways = {
            whole: this.#whole_images,
            tiles: this.#tiles,
            cells: this.#cells,
            patches: this.#patches,
            'patched tiles': this.#tiles,
        };
        const prepare = ways[this.#cutting.cut];
        const prepared = await prepare.call(this, asked);
        const history = this.prefix_conditioning ? [] : prepared.token_ids;
        return { ...prepared, history };
    }

    /** What is made of pictures. An image processor that the contract does not know is one that cuts none. */
    get #cutting() {
        const { image_processor_type: name } = this.processor.image_processor.config;
        const known = /** @type {Record<string, Cutting>} */ (IMAGE_PROCESSORS);
        return known[name?.replace(/Fast$/, '') ?? ''] ?? { cut: 'whole', text_first: false };
    }

    /**
     * The processor knows which tokens stand for the tiles of an image of this size. Patches of tiles come with their
     * shapes.
     * @param {Asked} asked
     */
    async #tiles(asked) {
        if (asked.pixel_values && !asked.images.length) {
            throw new TypeError('pixel_values: give image too, whose size says which tokens stand for the tiles');
        }
        const text = this.#text(asked, asked.images.length);
        if (!asked.images.length) {
            return { token_ids: this.#ids(text) };
        }
        const {
            input_ids,
            attention_mask: _,
            ...made
        } = await (this.#cutting.text_first ? this.processor(text, asked.images) : this.processor(asked.images, text));
        const pixels = { ...made, ...(asked.pixel_values && { pixel_values: asked.pixel_values }) };
        return { token_ids: to_numbers(input_ids), image_features: await this.encode(pixels) };
    }

    /**
     * Each image stands for as many tokens as it has features. LlavaProcessor would write those of the first alone.
     * @param {Asked} asked
     */
    async #whole_images(asked) {
        const count = asked.pixel_values?.dims[0] ?? asked.images.length;
        const text = this.#text(asked, count);
        if (!count) {
            return { token_ids: this.#ids(this.#with_images(text, [])) };
        }
        const pixel_values = asked.pixel_values ?? (await this.processor.image_processor(asked.images)).pixel_values;
        const image_features = await this.encode({ pixel_values });
        const tokens = image_features.size / image_features.dims[image_features.dims.length - 1] / count;
        const written = Array(count).fill(this.#image_token.repeat(tokens));
        return { token_ids: this.#ids(this.#with_images(text, written)), image_features };
    }

    /**
     * Images of sizes of their own, one run of the tower each. A line of a picture's cells is a line of tokens, with
     * what ends it; PixtralProcessor would write those of the first picture for all.
     * @param {Asked} asked
     */
    async #cells({ pixel_values, ...asked }) {
        const pictures = pixel_values
            ? [pixel_values]
            : await Promise.all(
                  asked.images.map(async (image) => (await this.processor.image_processor([image])).pixel_values),
              );
        const count = pictures.reduce((sum, { dims }) => sum + dims[0], 0);
        const text = this.#text(asked, count);
        if (!count) {
            return { token_ids: this.#ids(text) };
        }
        /** @type {Tensor[]} */
        const features = [];
        /** @type {string[]} */
        const written = [];
        for (const picture of pictures) {
            const found = await this.encode({ pixel_values: picture });
            features.push(found.view(-1, /** @type {number} */ (found.dims.at(-1))));
            written.push(...Array(picture.dims[0]).fill(this.#lines(picture)));
        }
        return { token_ids: this.#ids(this.#with_images(text, written)), image_features: cat(features, 0) };
    }

    /**
     * Images of sizes of their own as patches with a grid, one run of the tower each.
     * @param {Asked} asked
     * @returns {Promise<Omit<Prepared, 'history'>>}
     */
    async #patches({ pixel_values, ...asked }) {
        if (pixel_values) {
            throw new TypeError('pixel_values: give image, whose size says how its patches lie');
        }
        const text = this.#text(asked, asked.images.length);
        if (!asked.images.length) {
            return { token_ids: this.#ids(text), grids: [] };
        }
        const features = [];
        const grids = [];
        for (const image of asked.images) {
            const { pixel_values, image_grid_thw } = /** @type {Record<string, Tensor>} */ (
                await this.processor.image_processor([image])
            );
            features.push(await this.encode({ pixel_values, image_grid_thw }));
            grids.push([...image_grid_thw.data].slice(1).map((patches) => Number(patches) / this.#merge));
        }
        const written = features.map(({ dims }) => this.#image_token.repeat(dims[0]));
        return { token_ids: this.#ids(this.#with_images(text, written)), image_features: cat(features, 0), grids };
    }

    /** Lines, and columns, of patches of a cell. */
    get #merge() {
        return this.config.vision_config.spatial_merge_size ?? 2;
    }

    /**
     * @param {string} text
     * @param {string[]} images the tokens of each
     */
    #with_images(text, images) {
        const { before, after, behind, end } = this.#written_beside;
        const parts = text.split(this.#place);
        parts.push(`${behind}${parts.pop()}${end}`);
        const written = images.map((tokens) => before + tokens + after);
        return parts.map((part, index) => part + (written[index] ?? '')).join('');
    }

    /** What the processor writes beside an image's tokens, names of tokens replaced by these. */
    get #written_beside() {
        const config = /** @type {{ processor_class?: string }} */ (this.processor.image_processor.config);
        const known = /** @type {Record<string, typeof PROCESSORS.PaliGemmaProcessor>} */ (PROCESSORS);
        const written = known[config.processor_class ?? ''] ?? NOTHING_WRITTEN;
        return /** @type {typeof NOTHING_WRITTEN} */ (
            Object.fromEntries(Object.entries(written).map(([name, text]) => [name, this.#with_tokens(text)]))
        );
    }

    /** @param {string} text in which names in braces are those of tokens */
    #with_tokens(text) {
        return text.replace(/\{(\w+)\}/g, (_, name) => {
            const tokens = /** @type {Record<string, any>} */ ({ ...this.tokenizer.config });
            const token = name === 'bos_token' ? this.tokenizer.bos_token : (tokens[name]?.content ?? tokens[name]);
            if (typeof token !== 'string') {
                throw new Error(`tokenizer_config.json: ${name} is missing, and the model's processor writes it`);
            }
            return token;
        });
    }

    /** What stands for an image in a text. */
    get #place() {
        return this.#written_beside.place || this.#image_token;
    }

    /**
     * The tokens of a picture's cells.
     * @param {Tensor} pixel_values `[pictures, 3, height, width]`
     */
    #lines({ dims }) {
        const { patch_size, spatial_merge_size, image_break_token, image_end_token } = this.processor.config;
        const [rows, columns] = dims.slice(-2).map((side) => Math.floor(side / (patch_size * spatial_merge_size)));
        return Array(rows).fill(this.#image_token.repeat(columns)).join(image_break_token) + image_end_token;
    }

    get #image_token() {
        const of_class = /** @type {{ image_token?: string }} */ (this.processor.constructor).image_token;
        const own = this.processor.image_token ?? of_class ?? this.processor.config.image_token;
        const id = this.config.image_token_index ?? this.config.image_token_id;
        return own ?? this.tokenizer.decode([id], { skip_special_tokens: false });
    }

    /** @param {string} text */
    #ids(text) {
        return to_numbers(this.tokenizer(text).input_ids);
    }

    /**
     * The text, with an image token for each image.
     * @param {Asked} asked
     * @param {number} images how many
     */
    #text(asked, images) {
        const text = this.#written(asked, images);
        const places = text.split(this.#place).length - 1;
        if (places !== images) {
            throw new TypeError(`the prompt has ${places} image tokens ${this.#place} for ${images} images`);
        }
        return text;
    }

    /**
     * A prompt without image tokens is a user's message after the images.
     * @param {Asked} asked
     * @param {number} images how many
     * @returns {string}
     */
    #written({ prompt = '', messages }, images) {
        if (!messages && prompt.includes(this.#place)) {
            return prompt;
        }
        if (this.tokenizer.chat_template) {
            const text = prompt ? [{ type: 'text', text: prompt }] : [];
            const content = [...Array(images).fill({ type: 'image' }), ...text];
            const conversation = messages ?? [{ role: 'user', content }];
            return this.tokenizer.apply_chat_template(conversation, { tokenize: false, add_generation_prompt: true });
        }
        if (messages) {
            throw new Error('tokenizer_config.json has no chat_template: give a prompt in the place of messages');
        }
        return this.#place.repeat(images) + prompt;
    }

    /**
     * @param {RunInputs} inputs
     * @returns {Promise<Run>}
     */
    async run({ input_ids, image_features, grids = [], past_key_values, shift }) {
        const decoder = this.graphs[DECODER];
        const [batch, length] = input_ids.dims;
        const past = past_key_values ?? empty_cache(decoder, batch);
        const total = past_length(past) + length;
        const { inputs_embeds } = await this.graphs.embed_tokens.run({ input_ids });
        if (image_features) {
            this.#write(image_features, inputs_embeds, input_ids);
        }
        const places = this.#places(input_ids, grids, past_key_values && { first: total - length, shift });
        const outputs = await decoder.run({
            inputs_embeds,
            attention_mask: new Tensor('int64', new BigInt64Array(batch * total).fill(1n), [batch, total]),
            position_ids: places.position_ids,
            num_logits_to_keep: new Tensor('int64', [1n], []),
            ...past,
        });
        return { logits: outputs.logits, past_key_values: next_cache(outputs, past), shift: places.shift };
    }

    /**
     * A token's number in its row; where tokens have places in three axes, its place in each.
     * @param {Tensor} input_ids
     * @param {number[][]} grids
     * @param {{ first: number, shift?: number }} [after] what is in the cache; a prompt is none
     * @returns {{ position_ids: Tensor, shift?: number }}
     */
    #places(input_ids, grids, after) {
        const { data, dims } = input_ids;
        const [batch, length] = dims;
        const first = (after?.first ?? 0) + Number(NUMBERED_FROM_ONE.includes(this.config.model_type ?? ''));
        const has_axes = GRID_TYPES.includes(this.config.model_type ?? '');
        if (has_axes && !after) {
            const is_image = Array.from(data, (id) => Number(id) === this.config.image_token_id);
            const { places, shift } = grid_places(is_image, grids);
            return { position_ids: new Tensor('int64', BigInt64Array.from(places, BigInt), [3, batch, length]), shift };
        }
        const shift = has_axes ? (after?.shift ?? 0) : 0;
        const axes = has_axes ? 3 : 1;
        const numbers = Array.from({ length: axes * batch * length }, (_, index) => first + shift + (index % length));
        const shape = has_axes ? [3, batch, length] : [batch, length];
        return { position_ids: new Tensor('int64', BigInt64Array.from(numbers, BigInt), shape), shift };
    }

    /**
     * Writes features over the embeddings of image tokens. They may be narrower: what is behind them stays.
     * @param {Tensor} image_features
     * @param {Tensor} inputs_embeds
     * @param {Tensor} input_ids
     */
    #write(image_features, inputs_embeds, input_ids) {
        const width = /** @type {number} */ (inputs_embeds.dims.at(-1));
        const own = /** @type {number} */ (image_features.dims.at(-1));
        const image = BigInt(this.config.image_token_index ?? this.config.image_token_id);
        const places = [...input_ids.data.keys()].filter((index) => input_ids.data[index] === image);
        const rows = image_features.size / own;
        if (places.length !== rows || own > width) {
            throw new Error(`the prompt has ${places.length} image tokens for ${rows} rows of image features`);
        }
        places.forEach((place, row) => {
            /** @type {Float32Array} */ (inputs_embeds.data).set(
                /** @type {Float32Array} */ (image_features.data).subarray(row * own, (row + 1) * own),
                place * width,
            );
        });
    }

    carry() {
        return undefined;
    }
}

/**
 * `vision_encoder`, `embed_tokens`, `encoder_model` and `decoder_model_merged`: features in front of a task's sentence go
 * through a text encoder, and a decoder that is fed embeddings looks at the result.
 */
export class Tasks extends Layout {
    static graphs = ['vision_encoder', 'embed_tokens', 'encoder_model', DECODER];
    static decoders = [DECODER];
    name = /** @type {const} */ ('tasks');
    takes_prompt = true;

    /** @param {Record<string, Tensor>} pixels */
    async encode({ pixel_values }) {
        return (await this.graphs.vision_encoder.run({ pixel_values })).image_features;
    }

    /** @param {Asked} asked */
    async prepare(asked) {
        if (asked.messages !== undefined) {
            throw new TypeError('layout tasks does one task about one image: give prompt in the place of messages');
        }
        const { input_ids } = this.tokenizer(this.#sentence(asked.prompt ?? ''));
        const features = await this.encode(await this.pixels(asked));
        const start = this.generation_config.decoder_start_token_id;
        return { token_ids: [start], history: [start], image_features: await this.#read(features, input_ids) };
    }

    /**
     * A task stands for the sentence that the model was trained on. As `Florence2Processor` of transformers 5.23 has it.
     * @param {string} prompt
     * @returns {string}
     */
    #sentence(prompt) {
        const text = prompt.trim();
        if (!text) {
            throw new TypeError('layout tasks needs a prompt: a task, such as <CAPTION>, or a sentence');
        }
        for (const [task, sentence] of this.processor.task_prompts_without_inputs ?? []) {
            if (text.includes(task) && text !== task) {
                throw new TypeError(`prompt: ${task} takes no input: it is all of the prompt`);
            }
            if (text === task) {
                return sentence;
            }
        }
        for (const [task, sentence] of this.processor.task_prompts_with_input ?? []) {
            if (text.includes(task)) {
                return sentence.replaceAll('{input}', () => text.replaceAll(task, '').trim());
            }
        }
        return text;
    }

    /**
     * @param {Tensor} features `[1, rows, hidden]`
     * @param {Tensor} input_ids `[1, tokens]` of the sentence
     * @returns {Promise<Tensor>} `[1, rows + tokens, hidden]`
     */
    async #read(features, input_ids) {
        const { inputs_embeds } = await this.graphs.embed_tokens.run({ input_ids });
        const both = cat([features, inputs_embeds], 1);
        const feeds = { inputs_embeds: both, attention_mask: ones(both.dims.slice(0, 2)) };
        return (await this.graphs.encoder_model.run(feeds)).last_hidden_state;
    }

    /**
     * @param {RunInputs} inputs
     * @returns {Promise<Run>}
     */
    async run({ input_ids, image_features: states, past_key_values }) {
        if (!states) {
            throw new TypeError('image_features: layout tasks needs what the text encoder gave, in every run');
        }
        const past = past_key_values ?? empty_cache(this.graphs[DECODER], input_ids.dims[0]);
        const { inputs_embeds } = await this.graphs.embed_tokens.run({ input_ids });
        const outputs = await this.graphs[DECODER].run({
            inputs_embeds,
            encoder_hidden_states: states,
            encoder_attention_mask: ones(states.dims.slice(0, 2)),
            ...past,
        });
        return { logits: outputs.logits, past_key_values: next_cache(outputs, past) };
    }

    /**
     * @param {Tensor} states
     * @param {number} batch
     */
    carry(states, batch) {
        return states.dims[0] === batch ? states : copy_rows(states, Array(batch).fill(0));
    }

    /**
     * Places in the image are special tokens: none is left out but those that begin, end or pad a text.
     * @param {number[]} token_ids
     */
    decode(token_ids) {
        const { bos_token, eos_token, pad_token } = this.tokenizer;
        const around = [bos_token, eos_token, pad_token].flatMap((token) =>
            token ? this.tokenizer.convert_tokens_to_ids([token]) : [],
        );
        const kept = token_ids.filter((id) => !around.includes(id));
        return kept.length ? this.tokenizer.decode(kept, { skip_special_tokens: false }) : '';
    }
}

/** One graph a building block: `vision_encoder`, `projection`, `prefix_init`, `embed_tokens`, `language_model`. */
export class Components extends Layout {
    static graphs = ['vision_encoder', 'projection', 'prefix_init', 'embed_tokens', 'language_model'];
    static decoders = ['prefix_init', 'language_model'];
    name = /** @type {const} */ ('components');
    takes_prompt = true;

    get prefix_conditioning() {
        return true;
    }

    /** @param {Record<string, Tensor>} pixels */
    async encode({ pixel_values }) {
        return (await this.graphs.vision_encoder.run({ pixel_values })).last_hidden_state;
    }

    /** @param {Tensor} last_hidden_state */
    async project(last_hidden_state) {
        return (await this.graphs.projection.run({ last_hidden_state })).projected_prefix;
    }

    /** @param {Asked} asked */
    async prepare(asked) {
        if (asked.messages !== undefined) {
            throw new TypeError('layout components continues a prompt after the image; it has no use for messages');
        }
        const token_ids = asked.prompt
            ? to_numbers(this.tokenizer(asked.prompt, { add_special_tokens: false }).input_ids)
            : [];
        const image_features = await this.project(await this.encode(await this.pixels(asked)));
        return { token_ids, history: [], image_features };
    }

    /**
     * @param {RunInputs} inputs
     * @returns {Promise<Run>}
     */
    async run({ input_ids, image_features, past_key_values: past }) {
        if (!past) {
            const outputs = await this.graphs.prefix_init.run({ prefix_embeddings: image_features, input_ids });
            return { logits: outputs.logits, past_key_values: next_cache(outputs, {}) };
        }
        const { inputs_embeds } = await this.graphs.embed_tokens.run({ input_ids });
        const outputs = await this.graphs.language_model.run({ inputs_embeds, ...past });
        return { logits: outputs.logits, past_key_values: next_cache(outputs, past) };
    }

    carry() {
        return undefined;
    }
}

const LAYOUTS = { captioner: Captioner, chat: Chat, tasks: Tasks, components: Components };

/** @param {import('@huggingface/transformers').PretrainedConfig} config */
export function layout_of({ model_type }) {
    if (!model_type || !Object.hasOwn(MODEL_TYPES, model_type)) {
        const known = Object.keys(MODEL_TYPES).join(', ');
        throw new Error(`config.json: model_type '${model_type}' is of no layout known here (${known})`);
    }
    const name = MODEL_TYPES[/** @type {keyof typeof MODEL_TYPES} */ (model_type)];
    if (name === 'single') {
        throw new Error(
            'config.json: layout single: onnxruntime-web alone runs onnx/model.onnx; its card has the lines',
        );
    }
    return LAYOUTS[name];
}

/** @param {Tensor} ids `[1, tokens] int64` */
function to_numbers(ids) {
    return Array.from(ids.data, Number);
}
