/**
 * Where an image comes from: a chosen, dropped or pasted file, a sample, or the camera. All of them end in a `Blob`.
 *
 * @typedef {(action: () => unknown) => void} Attempt  Does it, and shows what goes wrong.
 * @typedef {(image: Blob, name: string) => Promise<void>} Show
 * @typedef {(transfer: { files: FileList | null } | null) => boolean} Take
 */

import { $ } from './dom.js';
import { Trouble } from './engine.js';

/** Settles when the image that was asked for last is shown, or cannot be. @type {Promise<unknown>} */
export let arriving = Promise.resolve();

/**
 * @template Sample
 * @param {(image: Blob, sample: Sample | null) => void} on_image
 * @param {(error: unknown) => void} on_error
 * @returns {(address: string, name: string, sample: Sample) => void} shows a sample
 */
export function connect(on_image, on_error) {
    let shown = '';

    /** @type {Attempt} */
    const attempt = (action) => {
        arriving = Promise.resolve().then(action).catch(on_error);
    };

    /**
     * Shows an image and hands it on; what was shown stays when the new one cannot be read.
     * @param {Blob} image
     * @param {string} name
     * @param {Sample | null} [sample]
     */
    async function show(image, name, sample = null) {
        await check(image, name);
        camera.close();
        URL.revokeObjectURL(shown);
        shown = URL.createObjectURL(image);
        const picture = $('#image', HTMLImageElement);
        picture.src = shown;
        picture.alt = name;
        await picture.decode();
        picture.classList.toggle('small', Math.max(picture.naturalWidth, picture.naturalHeight) < 200);
        picture.hidden = false;
        $('#drop').hidden = true;
        on_image(image, sample);
    }

    /** Whether there is a file among what was chosen, dropped or pasted. @type {Take} */
    function take(transfer) {
        const files = [...(transfer?.files ?? [])];
        const file = files.find(({ type }) => type.startsWith('image/')) ?? files[0];
        if (file) {
            attempt(() => show(file, file.name));
        }
        return Boolean(file);
    }

    const input = $('#file', HTMLInputElement);
    for (const id of ['drop', 'choose']) {
        $(`#${id}`).addEventListener('click', () => input.click());
    }
    input.addEventListener('change', () => {
        take(input);
        input.value = ''; // the same file can be chosen again
    });
    addEventListener('paste', (event) => {
        if (take(event.clipboardData)) {
            event.preventDefault();
        }
    });
    connect_drop(take);
    const camera = connect_camera(attempt, show);
    return (address, name, sample) => attempt(async () => show(await (await fetch(address)).blob(), name, sample));
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
        await show(await canvas.convertToBlob({ type: 'image/png' }), 'Picture from the camera');
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
 * @param {Take} take
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

/**
 * The worker decodes in the same way; here it is known which file it was.
 * @param {Blob} image
 * @param {string} name
 */
async function check(image, name) {
    try {
        (await createImageBitmap(image)).close();
    } catch {
        throw new Trouble(`The browser cannot read “${name}” as an image. Choose a PNG, JPEG, WebP or GIF file.`);
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
