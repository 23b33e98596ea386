/**
 * Captions images with stock transformers.js, by the calls that a user of the repo would write.
 *
 * Reads one JSON `Request` from stdin. Answers on stdout, one JSON object a line: a `Caption` for each finished item,
 * then a `Done`; on failure `{"error": "…"}` and exit status 1. Warnings of the libraries go to stderr.
 *
 * @typedef {{ path: string } | { remote_host: string, id: string, revision: string }} Model
 * @typedef {{ path: string, shape: number[] }} PixelValues  A file of little-endian float32.
 * @typedef {{ image?: string, pixel_values?: PixelValues, prompt: string | object[] }} Item  Pixel values win over the image.
 * @typedef {Record<string, number>} Generation  Options of `generate()`.
 * @typedef {{ model: Model, layout: 'captioner' | 'chat', dtype: string, generation: Generation, items: Item[] }} Request
 *
 * @typedef {{ index: number, token_ids: number[], text: string, milliseconds: number }} Caption
 * @typedef {{ done: true, transformers: string, onnxruntime: string, node: string, load_milliseconds: number }} Done
 *
 * @typedef {{ streamer: BaseStreamer, [option: string]: any }} GenerateOptions
 * @typedef {{ model: PreTrainedModel, caption: (item: Item, options: GenerateOptions) => Promise<string> }} Loaded
 */

import { readFile } from 'node:fs/promises';
import { text } from 'node:stream/consumers';

import {
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseStreamer,
    Idefics3Processor,
    PreTrainedModel,
    RawImage,
    Tensor,
    env,
    pipeline,
} from '@huggingface/transformers';

/** Collects the ids of one `generate()` call. Its first `put` is the prompt, or the decoder start token. */
class TokenRecorder extends BaseStreamer {
    /** @type {bigint[][]} */
    #chunks = [];

    /** @param {bigint[][]} ids of a batch of one */
    put(ids) {
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
 * @param {PixelValues} pixelValues
 * @returns {RawImage} a black image of the same height and width
 */
function blankImage({ shape }) {
    const [height, width] = shape.slice(-2);
    return new RawImage(new Uint8ClampedArray(height * width * 3), width, height, 3);
}

/** @type {(id: string, dtype: string) => Promise<Loaded>} */
async function loadCaptioner(id, dtype) {
    const captioner = await pipeline('image-to-text', id, { dtype });
    const { model, tokenizer } = captioner;

    /** @type {Loaded['caption']} */
    async function caption(item, options) {
        if (!item.pixel_values) {
            const [{ generated_text }] = await captioner(item.image, options);
            return generated_text;
        }
        const ids = await model.generate({ inputs: await readTensor(item.pixel_values), ...options });
        return tokenizer.batch_decode(ids, { skip_special_tokens: true })[0].trim(); // as the pipeline does
    }
    return { model, caption };
}

/** @type {(id: string, dtype: string) => Promise<Loaded>} */
async function loadChat(id, dtype) {
    const processor = await AutoProcessor.from_pretrained(id);
    const textFirst = processor instanceof Idefics3Processor;
    /** @param {object[]} conversation */
    const render = (conversation) => processor.apply_chat_template(conversation, { add_generation_prompt: true });
    const model = await AutoModelForImageTextToText.from_pretrained(id, { dtype });

    /** @type {Loaded['caption']} */
    async function caption(item, options) {
        const image = item.image ? await RawImage.read(item.image) : blankImage(item.pixel_values);
        const text = typeof item.prompt === 'string' ? item.prompt : render(item.prompt);
        const inputs = await (textFirst ? processor(text, image) : processor(image, text));
        if (item.pixel_values) {
            inputs.pixel_values = await readTensor(item.pixel_values);
        }
        const ids = await model.generate({ ...inputs, ...options });
        const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
        return processor.batch_decode(answer, { skip_special_tokens: true })[0];
    }
    return { model, caption };
}

const LAYOUTS = { captioner: loadCaptioner, chat: loadChat };

/**
 * transformers.js takes an unknown dtype, without a word, for the default one.
 * @param {PreTrainedModel} model
 * @param {string} dtype `auto` leaves the choice to the repo
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
    const start = performance.now();
    try {
        const text = await loaded.caption(request.items[index], { ...request.generation, streamer });
        return { index, token_ids: streamer.generated, text, milliseconds: performance.now() - start };
    } catch (error) {
        throw new Error(`item ${index}: ${error.message}`, { cause: error });
    }
}

/**
 * @param {Caption | Done | { error: string }} answer
 * @param {() => void} [written] called when the line has left this process
 */
function send(answer, written) {
    process.stdout.write(JSON.stringify(answer) + '\n', written);
}

/** @param {unknown} error */
function fail(error) {
    send({ error: error instanceof Error ? error.message : String(error) }, () => process.exit(1));
}

async function main() {
    /** @type {Request} */
    const request = JSON.parse(await text(process.stdin));
    const id = allowOnly(request.model);
    const start = performance.now();
    const loaded = await LAYOUTS[request.layout](id, request.dtype);
    const load_milliseconds = performance.now() - start;
    checkDtype(loaded.model, request.dtype);
    for (const index of request.items.keys()) {
        send(await captionItem(loaded, request, index));
    }
    await loaded.model.dispose();
    const onnxruntime = env.backends.onnx.versions.node;
    send({ done: true, transformers: env.version, onnxruntime, node: process.version, load_milliseconds });
}

console.log = console.error;
// Not every promise of the loader is awaited: when a declared external-data file is missing, `from_pretrained` never
// settles and this is the only sign of it.
process.on('unhandledRejection', fail);
main().catch(fail);
