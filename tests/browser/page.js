/**
 * Captions the golden pixel values with stock transformers.js, by the calls that a user of the repo would write.
 *
 * @typedef {{ dtype?: string, device?: string }} Options  Left out, the repo and the browser decide.
 * @typedef {{
 *     id: string, layout: 'captioner' | 'chat', options: Options, shape: [number, number, number, number],
 *     images: string[],
 * }} Request  `shape` [N, 3, H, W] is that of /inputs/pixels.f32; only the captioner layout takes `images`, URLs.
 * @typedef {{ token_ids: number[], text: string }} Caption  Without the prompt or the start token.
 * @typedef {{
 *     captions: Caption[], image_texts: string[], isolated: boolean,
 *     sessions: Record<string, { dtype: string, device: string }>,
 * }} Answer
 *
 * @typedef {{
 *     model: PreTrainedModel, caption: (pixelValues: Tensor) => Promise<Caption>,
 *     captionImage?: (url: string) => Promise<string>,
 * }} Loaded
 */
import {
    AutoModelForImageTextToText,
    AutoProcessor,
    RawImage,
    Tensor,
    env,
    pipeline,
} from '/transformers/transformers.js';

env.remoteHost = `${location.origin}/`;
const runtime = `${location.origin}/onnxruntime/ort-wasm-simd-threaded.asyncify`;
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };

/** @type {(id: string, options: Options) => Promise<Loaded>} */
async function loadCaptioner(id, options) {
    const captioner = await pipeline('image-to-text', id, options);
    const { model, tokenizer } = captioner;

    async function caption(pixelValues) {
        const ids = await model.generate({ inputs: pixelValues });
        const [text] = tokenizer.batch_decode(ids, { skip_special_tokens: true });
        return { token_ids: generated(ids, 1), text: text.trim() }; // as the pipeline does
    }
    async function captionImage(url) {
        const [{ generated_text }] = await captioner(url);
        return generated_text;
    }
    return { model, caption, captionImage };
}

/** @type {(id: string, options: Options) => Promise<Loaded>} */
async function loadChat(id, options) {
    const processor = await AutoProcessor.from_pretrained(id);
    const model = await AutoModelForImageTextToText.from_pretrained(id, options);

    async function caption(pixelValues) {
        const [height, width] = pixelValues.dims.slice(-2);
        const blank = new RawImage(new Uint8ClampedArray(height * width * 3), width, height, 3);
        const inputs = await processor(blank, processor.config.image_token);
        const ids = await model.generate({ ...inputs, pixel_values: pixelValues });
        const start = inputs.input_ids.dims.at(-1);
        const answer = ids.slice(null, [start, null]);
        const [text] = processor.batch_decode(answer, { skip_special_tokens: true });
        return { token_ids: generated(ids, start), text };
    }
    return { model, caption };
}

/** @type {(ids: Tensor, start: number) => number[]} */
function generated(ids, start) {
    return ids.tolist()[0].slice(start).map(Number);
}

/** @type {(shape: Request['shape']) => Promise<Tensor[]>} */
async function fetchPixelValues([count, ...shape]) {
    const body = await (await fetch('/inputs/pixels.f32')).arrayBuffer();
    const size = body.byteLength / count;
    const images = Array.from({ length: count }, (_, index) => body.slice(index * size, (index + 1) * size));
    return images.map((bytes) => new Tensor('float32', new Float32Array(bytes), [1, ...shape]));
}

/** @type {(request: Request) => Promise<Answer>} */
async function run({ id, layout, options, shape, images }) {
    const load = { captioner: loadCaptioner, chat: loadChat }[layout];
    const { model, caption, captionImage } = await load(id, options);
    const captions = [];
    for (const pixelValues of await fetchPixelValues(shape)) {
        captions.push(await caption(pixelValues));
    }
    const image_texts = [];
    for (const url of images) {
        image_texts.push(await captionImage(url));
    }
    const sessions = Object.entries(model.sessions).map(([name, { config }]) => [name, config]);
    return { captions, image_texts, isolated: crossOriginIsolated, sessions: Object.fromEntries(sessions) };
}

window.run = run;
