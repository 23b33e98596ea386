/**
 * Where images come from: chosen, dropped or pasted files, samples, or the camera. All of them end in `Given`.
 *
 * @typedef {import('./results.js').Given} Given
 * @typedef {import('./facts.js').Sample} Sample
 * @typedef {(action: () => unknown) => void} Attempt  Does it, and shows what goes wrong.
 * @typedef {(given: Given[]) => Promise<void>} Show
 */

import { $ } from './dom.js';
import { Trouble, server_trouble } from './engine.js';

/** Settles when the images that were asked for last are shown, or cannot be. @type {Promise<unknown>} */
export let arriving = Promise.resolve();

/**
 * @param {(given: Given[]) => void} on_images
 * @param {(error: unknown) => void} on_error
 * @returns {(sample: Sample, name: string) => void} shows a sample
 */
export function connect(on_images, on_error) {
    /** @type {Attempt} */
    const attempt = (action) => {
        arriving = Promise.resolve().then(action).catch(on_error);
    };

    /**
     * Hands images on; what was shown stays when none of the new ones can be read.
     * @type {Show}
     */
    async function show(given) {
        const readable = await Promise.all(given.map(({ image }) => is_readable(image)));
        const good = given.filter((_, index) => readable[index]);
        if (good.length) {
            camera.close();
            on_images(good);
        }
        if (good.length < given.length) {
            const bad = given.filter((_, index) => !readable[index]).map(({ name }) => `“${name}”`);
            const as = bad.length > 1 ? 'images' : 'an image';
            throw new Trouble(
                `The browser cannot read ${bad.join(', ')} as ${as}. Choose a PNG, JPEG, WebP or GIF file.`,
            );
        }
    }

    /**
     * Whether there are files among what was chosen, dropped or pasted.
     * @param {FileList | null | undefined} list
     */
    function take(list) {
        const files = [...(list ?? [])];
        if (files.length) {
            attempt(() => show(files.map((file) => ({ image: file, name: file.name, sample: null }))));
        }
        return files.length > 0;
    }

    const input = $('#file', HTMLInputElement);
    for (const id of ['drop', 'choose']) {
        $(`#${id}`).addEventListener('click', () => input.click());
    }
    input.addEventListener('change', () => {
        take(input.files);
        input.value = ''; // the same file can be chosen again
    });
    addEventListener('paste', (event) => {
        if (take(event.clipboardData?.files)) {
            event.preventDefault();
        }
    });
    connect_drop((transfer) => take(transfer?.files) || attempt(() => refuse(transfer)));
    const camera = connect_camera(attempt, show);
    return (sample, name) => attempt(async () => show([{ image: await fetched(sample.file), name, sample }]));
}

/**
 * What is dragged from another page is often its address alone.
 * @param {DataTransfer | null} transfer
 * @throws {Trouble}
 */
function refuse(transfer) {
    const address = transfer?.getData('text/uri-list') || transfer?.getData('text/plain') || '';
    throw new Trouble(
        /^https?:/.test(address)
            ? `That was the address of an image (${address.split('\n')[0].trim()}), which this page does not fetch: it asks ` +
                  'nothing of other servers. Save the image, then drop its file.'
            : 'There was no file in what you dropped. Drop an image file, or choose one.',
    );
}

/** @type {(address: string) => Promise<Blob>} */
async function fetched(address) {
    try {
        return await (await fetch(address)).blob();
    } catch (error) {
        throw (await server_trouble()) ?? error;
    }
}

/** @type {(attempt: Attempt, show: Show) => { close: () => void }} */
function connect_camera(attempt, show) {
    const video = $('#video', HTMLVideoElement);
    const camera = $('#camera', HTMLButtonElement);
    /** @type {MediaStream | null} */
    let stream = null;

    async function open() {
        try {
            stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
        } catch (error) {
            throw new Trouble(camera_trouble(/** @type {DOMException} */ (error).name));
        }
        video.srcObject = stream;
        await video.play();
        camera_view(true);
        $('#shoot').focus();
    }

    async function shoot() {
        const { videoWidth: width, videoHeight: height } = video;
        const canvas = new OffscreenCanvas(width, height);
        const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext('2d'));
        context.drawImage(video, 0, 0);
        const image = await canvas.convertToBlob({ type: 'image/png' });
        await show([{ image, name: 'Picture from the camera', sample: null }]);
    }

    function close() {
        if (stream) {
            stream.getTracks().forEach((track) => track.stop());
            stream = null;
            video.srcObject = null;
            camera_view(false);
            camera.focus();
        }
    }

    camera.addEventListener('click', () => attempt(open));
    $('#shoot').addEventListener('click', () => attempt(shoot));
    $('#leave').addEventListener('click', close);
    addEventListener('keydown', ({ key }) => key === 'Escape' && close());
    if (!navigator.mediaDevices?.getUserMedia) {
        camera.disabled = true;
        camera.title = 'The browser gives a camera only to pages on https or on this machine';
    }
    return { close };
}

/**
 * The whole page takes a drop, so that an image that misses the frame does not replace the page.
 * @param {(transfer: DataTransfer | null) => void} take
 */
function connect_drop(take) {
    /** @param {boolean} is */
    const over = (is) => $('#stage').classList.toggle('over', is);
    addEventListener('dragover', (event) => {
        event.preventDefault();
        over(true);
    });
    addEventListener('dragleave', ({ relatedTarget }) => over(relatedTarget !== null));
    addEventListener('drop', (event) => {
        event.preventDefault();
        over(false);
        take(event.dataTransfer);
    });
}

/** @param {boolean} on */
function camera_view(on) {
    const has_image = $('#image').hasAttribute('src');
    $('#video').hidden = !on;
    $('#image').hidden = on || !has_image;
    $('#drop').hidden = on || has_image;
    for (const id of ['choose', 'camera']) {
        $(`#${id}`).hidden = on;
    }
    for (const id of ['shoot', 'leave']) {
        $(`#${id}`).hidden = !on;
    }
}

/** The worker decodes in the same way. @type {(image: Blob) => Promise<boolean>} */
async function is_readable(image) {
    try {
        (await createImageBitmap(image)).close();
        return true;
    } catch {
        return false;
    }
}

/** @type {(name: string) => string} */
function camera_trouble(name) {
    /** @type {Record<string, string>} */
    const troubles = {
        NotAllowedError: 'The browser may not use the camera. Allow it beside the address bar, or choose an image.',
        NotFoundError: 'There is no camera on this device. Choose an image instead.',
        NotReadableError: 'The camera is in use by another program. Close that one, or choose an image.',
    };
    return troubles[name] ?? `The camera did not start (${name}). Choose an image instead.`;
}
