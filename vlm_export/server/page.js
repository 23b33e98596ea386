/**
 * The page at the root of `vlm-export serve`: tries the model with one image, by the API that programs use.
 *
 * @typedef {{ id: string, dtype: string, layout: string, backend: string, verified: boolean | null }} Served
 * @typedef {{ type: 'text', text: string } | { type: 'image_url', image_url: { url: string } }} Part
 * @typedef {{ model: string, messages: { role: string, content: Part[] }[] }} Chat
 */

const VERIFIED = new Map([
    [true, 'verified against PyTorch'],
    [false, 'failed vlm-export verify'],
    [null, 'not verified here'],
]);

/**
 * @param {string} id
 * @returns {HTMLElement}
 */
function element(id) {
    const found = document.getElementById(id);
    if (!found) {
        throw new Error(`the page has no #${id}`);
    }
    return found;
}

const image = /** @type {HTMLImageElement} */ (element('image'));
const file = /** @type {HTMLInputElement} */ (element('file'));
const question = /** @type {HTMLInputElement} */ (element('prompt'));

/**
 * The body of an answer; an error of the server's is thrown in its own words.
 * @param {string} path
 * @param {RequestInit} [options]
 */
async function json(path, options) {
    const response = await fetch(path, options).catch(() => {
        throw new Error('The server cannot be reached: does it still run?');
    });
    const body = await response.json();
    if (!response.ok) {
        throw new Error(body.error?.message ?? `status ${response.status}`);
    }
    return body;
}

/** @param {Blob} blob */
function dataUrl(blob) {
    return new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(/** @type {string} */ (reader.result));
        reader.onerror = () => reject(new Error('The file cannot be read.'));
        reader.readAsDataURL(blob);
    });
}

/** @param {Chat} chat */
async function ask(chat) {
    const started = performance.now();
    const answer = await json('v1/chat/completions', {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(chat),
    });
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    element('answer').textContent = answer.choices[0].message.content;
    element('note').textContent = `${answer.usage.completion_tokens} tokens in ${seconds} s`;
}

/**
 * Does what a button asks for, one at a time; what goes wrong is shown.
 * @param {() => Promise<Chat>} chat
 */
async function run(chat) {
    const buttons = document.querySelectorAll('button');
    for (const button of buttons) {
        button.disabled = true;
    }
    element('error').hidden = true;
    element('answer').textContent = '';
    element('note').textContent = 'Asking…';
    try {
        const asked = await chat();
        for (const part of asked.messages[0].content) {
            if (part.type === 'image_url') {
                image.src = part.image_url.url;
                image.hidden = false;
            }
        }
        await ask(asked);
    } catch (error) {
        element('note').textContent = '';
        element('error').textContent = error instanceof Error ? error.message : String(error);
        element('error').hidden = false;
    }
    for (const button of buttons) {
        button.disabled = false;
    }
}

/** @param {Served} served */
function show(served) {
    document.title = `${served.id}: vlm-export serve`;
    element('name').textContent = served.id;
    const where = served.backend === 'onnx' ? 'ONNX Runtime' : 'PyTorch';
    element('facts').textContent =
        `${served.layout}, in ${served.dtype}, on ${where}; ${VERIFIED.get(served.verified)}.`;
    const asks = ['chat', 'tasks'].includes(served.layout);
    element('prompt-field').hidden = !asks;
    if (served.layout === 'tasks') {
        question.value = '<CAPTION>';
    }
    const base = new URL('v1', document.baseURI);
    const sample = new URL('sample.json', document.baseURI);
    element('base').textContent = base.href;
    element('curl').textContent =
        `curl -s ${sample.href} | curl -s ${base.href}/chat/completions -H "content-type: application/json" -d @-`;
    element('form').addEventListener('submit', (event) => {
        event.preventDefault();
        run(async () => {
            const [chosen] = file.files ?? [];
            /** @type {Part[]} */
            const content = [{ type: 'image_url', image_url: { url: await dataUrl(chosen) } }];
            if (asks) {
                content.push({ type: 'text', text: question.value });
            }
            return { model: served.id, messages: [{ role: 'user', content }] };
        });
    });
    element('sample').addEventListener('click', () => run(() => json('sample.json')));
}

json('v1/models').then(
    ({ data }) => show(data[0]),
    (error) => {
        element('error').textContent = error.message;
        element('error').hidden = false;
    },
);
