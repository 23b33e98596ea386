import { VisionLanguageModel, load_from } from 'vlm-export';

load_from({ models: 'models/', runtime: 'onnxruntime/' });

const caption = /** @type {HTMLElement} */ (document.querySelector('#caption'));
const input = /** @type {HTMLInputElement} */ (document.querySelector('#file'));

const model = await VisionLanguageModel.from_pretrained('model', { dtype: 'fp32' });
caption.textContent = 'Choose an image.';
input.disabled = false;

input.addEventListener('change', async () => {
    const [image] = input.files ?? [];
    const [best] = await model.generate({
        image,
        on_token: ({ text }) => {
            caption.textContent = `${text} …`;
        },
    });
    caption.textContent = best.text;
});
