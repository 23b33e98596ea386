/** Uses a model in a worker, and tells what came of it. */

import { WorkerModel } from './vlm-export/remote.js';

const message = (error) => `${error.name}: ${error.message}`;
const started = (script) => new Worker(new URL(script, import.meta.url), { type: 'module' });

export async function run() {
    let progress = 0;
    const model = await WorkerModel.from_pretrained(started('remote-worker.js'), 'model', {
        dtype: 'fp32',
        progress_callback: (info) => {
            progress = info.status === 'progress_total' ? info.progress : progress;
        },
    });
    const image = 'samples/00.png';
    let tokens = 0;
    let last = '';
    const [{ text }] = await model.generate({
        image,
        on_token: (token) => {
            tokens += 1;
            last = token.text;
        },
    });
    const beams = await model.generate({ image, num_beams: 2, num_return_sequences: 2 });
    const stopping = new AbortController();
    const [{ finish_reason }] = await model.generate({
        image,
        signal: stopping.signal,
        on_token: () => stopping.abort(),
    });
    const wrong = await model.generate({ image, prompt: 'no' }).catch(message);
    const unsendable = await model.generate({ image: 1 }).catch(message);
    const { layout, dtype } = model;
    await model.dispose();
    const ended = await model.generate({ image }).catch(message);
    const missing = await WorkerModel.from_pretrained(started('nowhere.js'), 'model').catch(message);
    return {
        layout,
        dtype,
        progress,
        text,
        last,
        tokens,
        beams: beams.map(({ score }) => score),
        stopped: finish_reason,
        wrong,
        unsendable,
        ended,
        missing,
    };
}
