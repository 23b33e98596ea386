/**
 * What can be taken away: the caption, a table of all of them, and code for a page of one's own.
 *
 * @typedef {import('./facts.js').Facts} Facts
 * @typedef {import('./choices.js').Chosen} Chosen
 */

import { $ } from './dom.js';
import { Trouble } from './engine.js';
import { takes_prompt } from './facts.js';
import { csv, shown } from './results.js';
import { SUFFIXES } from './vlm-export/src/contract.js';

const SAID_FOR_MS = 2000;

/**
 * @param {Facts} facts
 * @param {(error: unknown) => void} on_error
 */
export function connect_sharing(facts, on_error) {
    const caption = () => $('#caption').textContent ?? '';
    $('#copy').addEventListener('click', ({ target }) => copy(caption(), target).catch(on_error));
    $('#copy-code').addEventListener('click', ({ target }) =>
        copy($('#code code').textContent ?? '', target).catch(on_error),
    );
    $('#share').hidden = !navigator.share;
    $('#share').addEventListener('click', () => share(facts.name, caption()).catch(on_error));
    $('#csv').addEventListener('click', () => save(`${facts.name}.csv`, csv(facts.name)));
}

/** @type {(text: string, button: EventTarget | null) => Promise<void>} */
async function copy(text, button) {
    if (!navigator.clipboard) {
        throw new Trouble('Browsers copy only on https, or from this machine. Select the text and copy it yourself.');
    }
    await navigator.clipboard.writeText(text);
    say(/** @type {HTMLButtonElement} */ (button), 'Copied');
}

/**
 * Says for a moment on a button that it did what it says.
 * @param {HTMLButtonElement} button
 * @param {string} words
 */
function say(button, words) {
    button.dataset.words ??= button.textContent ?? '';
    button.textContent = words;
    setTimeout(() => {
        button.textContent = button.dataset.words ?? '';
    }, SAID_FOR_MS);
}

/** With the image, where the system takes one. @type {(title: string, text: string) => Promise<void>} */
async function share(title, text) {
    const files = shown ? [new File([shown.image], shown.name, { type: shown.image.type })] : [];
    const whole = { title, text, files };
    try {
        await navigator.share(navigator.canShare?.(whole) ? whole : { title, text });
    } catch (error) {
        if (/** @type {Error} */ (error).name !== 'AbortError') {
            throw error; // else: the reader closed the system's dialog
        }
    }
}

/** @type {(name: string, text: string) => void} */
function save(name, text) {
    // The mark says to spreadsheets that it is UTF-8.
    const address = URL.createObjectURL(new Blob(['\uFEFF', text], { type: 'text/csv' }));
    Object.assign(document.createElement('a'), { href: address, download: name }).click();
    URL.revokeObjectURL(address);
}

/**
 * Shows a page that does what this one is set to: everything in it comes from this site, and the model from its repo.
 * @param {Facts} facts
 * @param {Chosen} chosen
 * @param {string} prompt
 */
export function show_code(facts, chosen, prompt) {
    const code = facts.layout === 'single' ? page_of_one_file(facts, chosen) : page(facts, chosen, prompt);
    $('#code code').textContent = code;
    $('#code-note').textContent =
        'A whole page. Put it beside the files of this site, which ' +
        'vlm-export demo --export writes to a folder, and a picture photo.jpg beside it.';
}

/** @type {(facts: Facts, chosen: Chosen) => string} */
function page_of_one_file(facts, { device, dtype }) {
    const suffix = SUFFIXES[/** @type {keyof typeof SUFFIXES} */ (dtype)];
    const folder = facts.home ? `${facts.home.address}/resolve/main` : './model';
    return `<!doctype html>
<meta charset="utf-8" />
<p id="caption">Loading…</p>
<script type="module">
    import * as ort from './onnxruntime/ort.webgpu.min.mjs';

    const photo = await createImageBitmap(await (await fetch('photo.jpg')).blob());
    const canvas = new OffscreenCanvas(photo.width, photo.height).getContext('2d');
    canvas.drawImage(photo, 0, 0);
    const { data, width, height } = canvas.getImageData(0, 0, photo.width, photo.height);
    const image = new ort.Tensor('uint8', Uint8Array.from(data.filter((_, place) => place % 4 < 3)), [height, width, 3]);
    const options = new ort.Tensor('float32', [], [0]);
    const session = await ort.InferenceSession.create('${folder}/onnx/model${suffix}.onnx', {
        executionProviders: ['${device}'],
    });
    const { texts } = await session.run({ image, options }, ['texts']);
    document.querySelector('#caption').textContent = new TextDecoder().decode(texts.data);
</script>
`;
}

/** @type {(facts: Facts, chosen: Chosen, prompt: string) => string} */
function page(facts, { device, dtype, num_beams }, prompt) {
    const asked = [
        "image: 'photo.jpg'",
        ...(takes_prompt(facts) ? [`prompt: ${in_code(prompt)}`] : []),
        ...(num_beams > 1 ? [`num_beams: ${num_beams}`] : []),
    ];
    const models = facts.home ? '' : "models: './', ";
    return `<!doctype html>
<meta charset="utf-8" />
<p id="caption">Loading…</p>
<script type="module">
    import { load_from, VisionLanguageModel } from './vlm-export/index.js';

    const runtime = 'onnxruntime/ort-wasm-simd-threaded.asyncify';
    load_from({ ${models}runtime: { mjs: \`\${runtime}.mjs\`, wasm: \`\${runtime}.wasm\` } });

    const model = await VisionLanguageModel.from_pretrained('${facts.home?.repo_id ?? 'model'}', {
        dtype: '${dtype}',
        device: '${device}',
    });
    const [best] = await model.generate({ ${asked.join(', ')} });
    document.querySelector('#caption').textContent = best.text;
</script>
`;
}

/** A string in code that is in a page. @type {(text: string) => string} */
function in_code(text) {
    return JSON.stringify(text).replaceAll('<', '\\u003c');
}
