/**
 * Captions images with stock transformers.js, by the calls that a user of the repo would write.
 *
 * `caption.mjs` does so in Node, `../browser/page.mjs` in a page. They differ in where files are.
 *
 * @typedef {import('@huggingface/transformers').Message} Message
 * @typedef {import('@huggingface/transformers').DataType} Dtype
 * @typedef {import('@huggingface/transformers').PreTrainedTokenizer} PreTrainedTokenizer
 * @typedef {{ read: (name: string) => Promise<Float32Array>, write: (name: string, data: Float32Array) => Promise<void>,
 *     text: (id: string, file: string) => Promise<string>, address: (id: string, file: string) => string,
 *     runtime: () => Promise<typeof import('onnxruntime-common')> }} Files  Of little-endian float32; then a repo's
 *     files, and ONNX Runtime, for graphs that transformers.js does not load.
 * @typedef {{ path: string, shape: number[], size?: number[] }} PixelValues  A file, the shape of what is in it, and
 *     of patches the height and width of the picture.
 * @typedef {{ image: string, pixel_values?: undefined, pixels_out?: string }
 *     | { image: string, pixel_values: PixelValues, pixels_out?: string }
 *     | { image?: undefined, pixel_values: PixelValues, pixels_out?: undefined }} Picture  Pixel values win over the
 *     image. Those that the processor makes of the image are written to `pixels_out`.
 * @typedef {Picture & { prompt: string | Message[], scores_out?: string, may_fail?: boolean }} Item  The scores that
 *     each token is taken from are written to `scores_out`. One that may fail ends in a `Caption` that says why, and
 *     nothing else ends.
 * @typedef {Record<string, number>} Generation  Options of `generate()`.
 * @typedef {{ index: number, token_ids: number[], text: string, prompt_ids: number[], pixel_shape?: number[],
 *     score_shape?: number[], failure?: string, first_token_milliseconds: number, milliseconds: number }}
 *     Caption  Both times count from the start of the item, reading its image included.
 *
 * @typedef {{ dtype?: Dtype, device?: 'auto' | 'wasm' | 'webgpu', session_options?: object }} LoadOptions
 * @typedef {{ streamer: any, logits_processor?: any, [option: string]: unknown }} GenerateOptions  Any `BaseStreamer`
 *     will do, but the types of transformers.js ask for a `TextStreamer` too.
 * @typedef {{ prompt_ids: number[], pixel_values?: Tensor }} ModelInputs  What the processor made, for a caller that asks.
 * @typedef {{ model: PreTrainedModel, caption: (item: Item, options: GenerateOptions, modelInputs: ModelInputs) => Promise<string> }} Loaded
 */

import {
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseStreamer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RawImage,
    Tensor,
    pipeline,
} from '@huggingface/transformers';

import { loadPrompts, pictureOf, readTensor } from './prompts.mjs';
import { loadSingle } from './single.mjs';

/** Collects the ids of one `generate()` call. Its first `put` is the prompt, or the decoder start token. */
class TokenRecorder extends BaseStreamer {
    /** @type {bigint[][]} */
    #chunks = [];

    /** When the first generated token came, by `performance.now()`. */
    firstToken = NaN;

    /** @param {bigint[][]} ids of a batch of one */
    put(ids) {
        if (this.#chunks.length === 1) {
            this.firstToken = performance.now();
        }
        this.#chunks.push([...ids[0]]);
    }

    end() {}

    /** @returns {number[]} the generated ids; the one that stopped generation is the last */
    get generated() {
        return this.#chunks.slice(1).flat().map(Number);
    }
}

/** Keeps the scores that each token is taken from; as the last of the processors, it sees what the others leave. */
class ScoreRecorder extends LogitsProcessor {
    /** @type {Float32Array[]} */
    steps = [];

    /**
     * @param {bigint[][]} _
     * @param {Tensor} logits of a batch of one
     */
    _call(_, logits) {
        this.steps.push(Float32Array.from(/** @type {Float32Array} */ (logits.data)));
        return logits;
    }

    /** @returns {[Float32Array, number[]]} the scores of all tokens, one token's after another's, and their shape */
    get scores() {
        const size = this.steps[0]?.length ?? 0;
        const all = new Float32Array(this.steps.length * size);
        for (const [index, step] of this.steps.entries()) {
            all.set(step, index * size);
        }
        return [all, [this.steps.length, size]];
    }
}

/** @type {(id: string, options: LoadOptions, files: Files) => Promise<Loaded>} */
async function loadCaptioner(id, options, files) {
    const captioner = await pipeline('image-to-text', id, options);
    const { model, tokenizer } = captioner;

    /** @type {Loaded['caption']} */
    async function caption(item, options, modelInputs) {
        if (item.pixels_out) {
            modelInputs.pixel_values = (await captioner.processor(await RawImage.read(item.image))).pixel_values;
        }
        if (!item.pixel_values) {
            const [{ generated_text }] = await captioner(item.image, options);
            return generated_text;
        }
        const inputs = await readTensor(item.pixel_values, files);
        const ids = /** @type {Tensor} */ (await model.generate({ inputs, ...options }));
        return tokenizer.batch_decode(ids, { skip_special_tokens: true })[0].trim(); // as the pipeline does
    }
    return { model, caption };
}

/** @type {(id: string, options: LoadOptions, files: Files) => Promise<Loaded>} */
async function loadChat(id, loading, files) {
    const { processor, inputsOf } = await loadPrompts(id, files);
    const model = await AutoModelForImageTextToText.from_pretrained(id, loading);

    /** @type {Loaded['caption']} */
    async function caption(item, options, modelInputs) {
        const inputs = await inputsOf(item, modelInputs);
        const ids = /** @type {Tensor} */ (await model.generate({ ...inputs, ...options }));
        const answer = ids.slice(null, /** @type {any} */ ([inputs.input_ids.dims.at(-1), null]));
        return processor.batch_decode(answer, { skip_special_tokens: true })[0];
    }
    return { model, caption };
}

/** @type {(id: string, options: LoadOptions, files: Files) => Promise<Loaded>} */
async function loadTasks(id, loading, files) {
    const processor = await AutoProcessor.from_pretrained(id);
    const model = await AutoModelForImageTextToText.from_pretrained(id, loading);
    const { bos_token, eos_token, pad_token } = /** @type {PreTrainedTokenizer} */ (processor.tokenizer);
    const around = [bos_token, eos_token, pad_token].filter((token) => token !== null);

    /** @type {Loaded['caption']} */
    async function caption(item, options, modelInputs) {
        const inputs = await processor(await pictureOf(item), item.prompt);
        modelInputs.prompt_ids = [...inputs.input_ids.data].map(Number);
        modelInputs.pixel_values = inputs.pixel_values;
        if (item.pixel_values) {
            inputs.pixel_values = await readTensor(item.pixel_values, files);
        }
        const ids = /** @type {Tensor} */ (await model.generate({ ...inputs, ...options }));
        const [text] = processor.batch_decode(ids, { skip_special_tokens: false });
        return around.reduce((rest, token) => rest.replaceAll(token, ''), text).trim();
    }
    return { model, caption };
}

const LAYOUTS = { captioner: loadCaptioner, chat: loadChat, tasks: loadTasks, single: loadSingle };
/** @typedef {keyof typeof LAYOUTS} Layout */

/** @type {(layout: Layout, id: string, options: LoadOptions, files: Files) => Promise<Loaded>} */
export async function load(layout, id, options, files) {
    const loaded = await LAYOUTS[layout](id, options, files);
    checkDtype(loaded.model, options.dtype);
    return loaded;
}

/**
 * transformers.js takes an unknown dtype, without a word, for the default one.
 * @param {PreTrainedModel} model
 * @param {Dtype} [dtype] none, or `auto`, leaves the choice to the repo
 */
function checkDtype(model, dtype = 'auto') {
    for (const [name, session] of Object.entries(model.sessions)) {
        if (dtype !== 'auto' && session.config.dtype !== dtype) {
            throw new Error(`${name} was loaded as ${session.config.dtype} instead of ${dtype}`);
        }
    }
}

/** @type {(loaded: Loaded, items: Item[], index: number, generation: Generation, files: Files) => Promise<Caption>} */
export async function captionItem(loaded, items, index, generation, files) {
    const item = items[index];
    const streamer = new TokenRecorder();
    const recorder = new ScoreRecorder();
    const logits_processor = new LogitsProcessorList();
    if (item.scores_out) {
        logits_processor.push(recorder);
    }
    /** @type {ModelInputs} */
    const modelInputs = { prompt_ids: [] };
    const start = performance.now();
    try {
        const text = await loaded.caption(item, { ...generation, streamer, logits_processor }, modelInputs);
        const milliseconds = performance.now() - start;
        const first_token_milliseconds = streamer.firstToken - start;
        const { prompt_ids, pixel_values } = modelInputs;
        const shapes = await keep(item, /** @type {Tensor} */ (pixel_values), recorder, files);
        const token_ids = streamer.generated;
        return { index, token_ids, text, prompt_ids, ...shapes, first_token_milliseconds, milliseconds };
    } catch (error) {
        if (item.may_fail) {
            const none = { token_ids: [], text: '', prompt_ids: [], first_token_milliseconds: 0, milliseconds: 0 };
            return { index, failure: reasonOf(error), ...none };
        }
        throw new Error(`item ${index}: ${reasonOf(error)}`, { cause: error });
    }
}

/**
 * Writes what an item asks for.
 * @type {(item: Item, pixels: Tensor, recorder: ScoreRecorder, files: Files)
 *     => Promise<Pick<Caption, 'pixel_shape' | 'score_shape'>>}
 */
async function keep({ pixels_out, scores_out }, pixels, recorder, files) {
    /** @type {Pick<Caption, 'pixel_shape' | 'score_shape'>} */
    const shapes = {};
    if (pixels_out) {
        await files.write(pixels_out, Float32Array.from(/** @type {Float32Array} */ (pixels.data), Number));
        shapes.pixel_shape = pixels.dims;
    }
    if (scores_out) {
        const [scores, shape] = recorder.scores;
        await files.write(scores_out, scores);
        shapes.score_shape = shape;
    }
    return shapes;
}

/**
 * @param {PreTrainedModel} model
 * @returns {number[]} the ids that it stops at
 */
export function endsOf(model) {
    return [model.generation_config?.eos_token_id ?? []].flat();
}

/** @type {(error: unknown) => string} */
export function reasonOf(error) {
    return String(/** @type {Partial<Error> | undefined} */ (error)?.message ?? error);
}
