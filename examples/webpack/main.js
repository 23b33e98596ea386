import { VisionLanguageModel, load_from } from 'vlm-export';

// webpack copies the two files of the runtime and gives their addresses: webpack.config.js says that they are assets.
load_from({
    models: 'models/',
    runtime: {
        mjs: new URL('onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs', import.meta.url),
        wasm: new URL('onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm', import.meta.url),
    },
});

const caption = /** @type {HTMLElement} */ (document.querySelector('#caption'));
const input = /** @type {HTMLInputElement} */ (document.querySelector('#file'));

const model = await VisionLanguageModel.from_pretrained('model', { dtype: 'fp32' });
caption.textContent = 'Choose an image.';
input.disabled = false;

input.addEventListener('change', async () => {
    const [image] = input.files ?? [];
    const [best] = await model.generate({ image });
    caption.textContent = best.text;
});
