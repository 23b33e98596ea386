/**
 * Captions images with stock transformers.js, by the calls that a user of the repo would write.
 *
 * Reads one JSON `Request` from stdin. Answers on stdout, one JSON object a line: a `Caption` for each finished item,
 * then a `Done`; on failure `{"error": "…"}` and exit status 1. Warnings of the libraries go to stderr.
 * Its ONNX Runtime is onnxruntime-node, unless `onnxruntime-web.mjs` was imported before.
 *
 * @typedef {{ path: string } | { remote_host: string, id: string, revision: string }} Model
 * @typedef {import('@huggingface/transformers').Message} Message
 * @typedef {{ path: string, shape: number[] }} PixelValues  A file of little-endian float32.
 * @typedef {{ image: string, pixel_values?: undefined, pixels_out?: string }
 *     | { image: string, pixel_values: PixelValues, pixels_out?: string }
 *     | { image?: undefined, pixel_values: PixelValues, pixels_out?: undefined }} Picture  Pixel values win over the
 *     image. Those that the processor makes of the image are written to `pixels_out`.
 * @typedef {Picture & { prompt: string | Message[], may_fail?: boolean }} Item  One that may fail ends in a `Caption`
 *     that says why, and nothing else ends.
 * @typedef {Record<string, number>} Generation  Options of `generate()`.
 * @typedef {{ model: Model, layout: 'captioner' | 'chat', dtype: Dtype, threads?: number, generation: Generation,
 *     items: Item[], warm_up_milliseconds?: number, repeat_milliseconds?: number }} Request  Without threads their number is ONNX Runtime's default.
 *     The warm-up is captions, at least so long, that nobody is told of. Then all items are captioned, and again until
 *     the time to repeat has passed.
 *
 * @typedef {{ index: number, token_ids: number[], text: string, prompt_ids: number[], pixel_shape?: number[],
 *     failure?: string, first_token_milliseconds: number, milliseconds: number }}
 *     Caption  Both times count from the start of the item, reading its image included.
 * @typedef {{ done: true, transformers: string, onnxruntime: string, node: string, load_milliseconds: number,
 *     peak_memory_bytes: number, eos_token_ids: number[] }} Done  The memory is that of the whole process.
 *
 * @typedef {import('@huggingface/transformers').DataType} Dtype
 * @typedef {{ dtype: Dtype, device?: 'auto', session_options: object }} LoadOptions
 * @typedef {{ streamer: any, [option: string]: unknown }} GenerateOptions  Any `BaseStreamer` will do, but the types of
 *     transformers.js ask for a `TextStreamer` too.
 * @typedef {{ prompt_ids: number[], pixel_values?: Tensor }} ModelInputs  What the processor made, for a caller that asks.
 * @typedef {{ model: PreTrainedModel, caption: (item: Item, options: GenerateOptions, modelInputs: ModelInputs) => Promise<string> }} Loaded
 */

import { readFile, writeFile } from 'node:fs/promises';
import { text } from 'node:stream/consumers';

import {
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseStreamer,
    PreTrainedModel,
    RawImage,
    Tensor,
    env,
    pipeline,
} from '@huggingface/transformers';

import { IMAGE_PROCESSORS } from './contract.mjs';

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

/**
 * Keeps downloads in memory. Without any cache, transformers.js cannot load graphs from a server in Node: "Unable to
 * get model file path or buffer".
 * @returns {NonNullable<typeof env.customCache>}
 */
function memoryCache() {
    /** @type {Map<string, ArrayBuffer>} */
    const bodies = new Map();
    return {
        match: async (key) => (bodies.has(key) ? new Response(bodies.get(key)) : undefined),
        put: async (key, response) => void bodies.set(key, await response.arrayBuffer()),
    };
}

/**
 * Lets transformers.js read this model from where the request says, and from nowhere else.
 * @param {Model} model
 * @returns {string} what `from_pretrained` takes
 */
function allowOnly(model) {
    env.useFSCache = false;
    if ('path' in model) {
        env.allowRemoteModels = false;
        return model.path;
    }
    env.allowLocalModels = false;
    env.remoteHost = model.remote_host;
    // Not as an option: some requests of `pipeline` and `AutoProcessor` go to `main` whatever the revision is.
    env.remotePathTemplate = env.remotePathTemplate.replace('{revision}', encodeURIComponent(model.revision));
    env.useCustomCache = true;
    env.customCache = memoryCache();
    return model.id;
}

/**
 * @param {PixelValues} pixelValues
 * @returns {Promise<Tensor>}
 */
async function readTensor({ path, shape }) {
    const { buffer, byteOffset, byteLength } = await readFile(path);
    return new Tensor('float32', new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength)), shape);
}

/**
 * @param {Tensor} tensor
 * @param {string} path
 * @returns {Promise<number[]>} its shape
 */
async function writeTensor(tensor, path) {
    const { buffer, byteOffset, byteLength } = Float32Array.from(tensor.data, Number);
    await writeFile(path, new Uint8Array(buffer, byteOffset, byteLength));
    return tensor.dims;
}

/**
 * @param {PixelValues} pixelValues
 * @returns {RawImage} a black image of the same height and width
 */
function blankImage({ shape }) {
    const [height, width] = shape.slice(-2);
    return new RawImage(new Uint8ClampedArray(height * width * 3), width, height, 3);
}

/** Whether ONNX Runtime is onnxruntime-web's. */
const onWasm = Symbol.for('onnxruntime') in globalThis;
/** Its settings, all of which are there once transformers.js is imported. */
const onnx = /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx);

/**
 * @param {Request} request
 * @returns {LoadOptions}
 */
function loadOptions({ dtype, threads }) {
    if (!onWasm) {
        return { dtype, session_options: threads ? { intraOpNumThreads: threads } : {} };
    }
    if (threads) {
        onnx.wasm.numThreads = threads;
    }
    // Beside a foreign ONNX Runtime transformers.js knows no device, but takes `auto` for those of the session options.
    return { dtype, device: 'auto', session_options: { executionProviders: ['wasm'] } };
}

/** @type {(id: string, options: LoadOptions) => Promise<Loaded>} */
async function loadCaptioner(id, options) {
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
        const inputs = await readTensor(item.pixel_values);
        const ids = /** @type {Tensor} */ (await model.generate({ inputs, ...options }));
        return tokenizer.batch_decode(ids, { skip_special_tokens: true })[0].trim(); // as the pipeline does
    }
    return { model, caption };
}

/** @type {(id: string, options: LoadOptions) => Promise<Loaded>} */
async function loadChat(id, loading) {
    const processor = await AutoProcessor.from_pretrained(id);
    /** @param {Message[]} conversation */
    const render = (conversation) => processor.apply_chat_template(conversation, { add_generation_prompt: true });
    const model = await AutoModelForImageTextToText.from_pretrained(id, loading);
    const settings = /** @type {{ image_processor_type?: string }} */ (processor.image_processor?.config);
    const known = /** @type {Record<string, { tiles: boolean }>} */ (IMAGE_PROCESSORS);
    const textFirst = known[settings.image_processor_type?.replace(/Fast$/, '') ?? '']?.tiles;

    /** @type {Loaded['caption']} */
    async function caption(item, options, modelInputs) {
        const image = item.image === undefined ? blankImage(item.pixel_values) : await RawImage.read(item.image);
        const text = typeof item.prompt === 'string' ? item.prompt : render(item.prompt);
        const inputs = await (textFirst ? processor(text, image) : processor(image, text));
        modelInputs.prompt_ids = [...inputs.input_ids.data].map(Number);
        modelInputs.pixel_values = inputs.pixel_values;
        if (item.pixel_values) {
            inputs.pixel_values = await readTensor(item.pixel_values);
        }
        const ids = /** @type {Tensor} */ (await model.generate({ ...inputs, ...options }));
        const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
        return processor.batch_decode(answer, { skip_special_tokens: true })[0];
    }
    return { model, caption };
}

const LAYOUTS = { captioner: loadCaptioner, chat: loadChat };

/**
 * transformers.js takes an unknown dtype, without a word, for the default one.
 * @param {PreTrainedModel} model
 * @param {Dtype} dtype `auto` leaves the choice to the repo
 */
function checkDtype(model, dtype) {
    for (const [name, session] of Object.entries(model.sessions)) {
        if (dtype !== 'auto' && session.config.dtype !== dtype) {
            throw new Error(`${name} was loaded as ${session.config.dtype} instead of ${dtype}`);
        }
    }
}

/**
 * @param {Loaded} loaded
 * @param {Request} request
 * @param {number} index of the item
 * @returns {Promise<Caption>}
 */
async function captionItem(loaded, request, index) {
    const streamer = new TokenRecorder();
    /** @type {ModelInputs} */
    const modelInputs = { prompt_ids: [] };
    const item = request.items[index];
    const start = performance.now();
    try {
        const text = await loaded.caption(item, { ...request.generation, streamer }, modelInputs);
        const milliseconds = performance.now() - start;
        const first_token_milliseconds = streamer.firstToken - start;
        const { prompt_ids } = modelInputs;
        const pixels = /** @type {Tensor} */ (modelInputs.pixel_values);
        const pixel_shape = item.pixels_out ? await writeTensor(pixels, item.pixels_out) : undefined;
        const token_ids = streamer.generated;
        return { index, token_ids, text, prompt_ids, pixel_shape, first_token_milliseconds, milliseconds };
    } catch (error) {
        if (item.may_fail) {
            const none = { token_ids: [], text: '', prompt_ids: [], first_token_milliseconds: 0, milliseconds: 0 };
            return { index, failure: reasonOf(error), ...none };
        }
        throw new Error(`item ${index}: ${reasonOf(error)}`, { cause: error });
    }
}

/** @type {(loaded: Loaded, request: Request) => Promise<void>} */
async function warmUp(loaded, request) {
    const start = performance.now();
    for (let index = 0; performance.now() - start < (request.warm_up_milliseconds ?? 0); index++) {
        await captionItem(loaded, request, index % request.items.length);
    }
}

/** @returns {Promise<number>} the most memory that this process has held, in bytes */
async function peakMemory() {
    // Not `maxRSS` where it can be had otherwise: on Linux a process takes over its parent's at the start.
    const status = await readFile('/proc/self/status', 'utf8').catch(() => '');
    const peak = status.match(/^VmHWM:\s*(\d+) kB$/m);
    return 1024 * (peak ? Number(peak[1]) : process.resourceUsage().maxRSS);
}

/**
 * @param {Caption | Done | { error: string }} answer
 * @param {() => void} [written] called when the line has left this process
 */
function send(answer, written) {
    process.stdout.write(`${JSON.stringify(answer)}\n`, written);
}

/** @type {(error: unknown) => string} */
function reasonOf(error) {
    return String(/** @type {Partial<Error> | undefined} */ (error)?.message ?? error);
}

/** @param {unknown} error */
function fail(error) {
    send({ error: reasonOf(error) }, () => process.exit(1));
}

async function main() {
    /** @type {Request} */
    const request = JSON.parse(await text(process.stdin));
    const id = allowOnly(request.model);
    const start = performance.now();
    const loaded = await LAYOUTS[request.layout](id, loadOptions(request));
    const load_milliseconds = performance.now() - start;
    checkDtype(loaded.model, request.dtype);
    await warmUp(loaded, request);
    const first = performance.now();
    do {
        for (const index of request.items.keys()) {
            send(await captionItem(loaded, request, index));
        }
    } while (performance.now() - first < (request.repeat_milliseconds ?? 0));
    await loaded.model.dispose();
    const { web, node } = onnx.versions;
    send({
        done: true,
        transformers: env.version,
        onnxruntime: /** @type {string} */ (onWasm ? web : node),
        node: process.version,
        load_milliseconds,
        peak_memory_bytes: await peakMemory(),
        eos_token_ids: [loaded.model.generation_config?.eos_token_id ?? []].flat(),
    });
}

console.log = console.error;
// Not every promise of the loader is awaited: when a declared external-data file is missing, `from_pretrained` never
// settles and this is the only sign of it.
process.on('unhandledRejection', fail);
main().catch(fail);
