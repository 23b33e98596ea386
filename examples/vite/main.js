import { WorkerModel } from 'vlm-export/remote';

const caption = /** @type {HTMLElement} */ (document.querySelector('#caption'));
const input = /** @type {HTMLInputElement} */ (document.querySelector('#file'));

const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
const model = await WorkerModel.from_pretrained(worker, 'model', { dtype: 'fp32' });
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
