/**
 * Reads pictures and prompts as the processor of a chat repo does, whatever then runs its graphs.
 *
 * @typedef {import('./client.mjs').Files} Files
 * @typedef {import('./client.mjs').Item} Item
 * @typedef {import('./client.mjs').PixelValues} PixelValues
 * @typedef {import('./client.mjs').ModelInputs} ModelInputs
 * @typedef {import('@huggingface/transformers').Message} Message
 */

import { AutoProcessor, RawImage, Tensor } from '@huggingface/transformers';

import { IMAGE_PROCESSORS } from './contract.mjs';

/**
 * @param {Item} item
 * @returns {RawImage | Promise<RawImage>} its image, or a black one of the size that its pixels have
 */
export function pictureOf({ image, pixel_values }) {
    if (image !== undefined) {
        return RawImage.read(image);
    }
    const { shape, size = shape.slice(-2) } = /** @type {PixelValues} */ (pixel_values);
    const [height, width] = size;
    return new RawImage(new Uint8ClampedArray(height * width * 3), width, height, 3);
}

/** @type {(pixelValues: PixelValues, files: Files) => Promise<Tensor>} */
export async function readTensor({ path, shape }, files) {
    return new Tensor('float32', await files.read(path), shape);
}

/**
 * @param {string} id
 * @param {Files} files
 */
export async function loadPrompts(id, files) {
    const processor = await AutoProcessor.from_pretrained(id);
    const settings = /** @type {{ image_processor_type?: string }} */ (processor.image_processor?.config);
    const known = /** @type {Record<string, { text_first: boolean }>} */ (IMAGE_PROCESSORS);
    const textFirst = known[settings.image_processor_type?.replace(/Fast$/, '') ?? '']?.text_first;
    /** @param {Message[]} conversation */
    const render = (conversation) => processor.apply_chat_template(conversation, { add_generation_prompt: true });

    /**
     * @param {Item} item
     * @param {ModelInputs} modelInputs is told what the processor made
     * @returns {Promise<Record<string, Tensor>>} what the model is fed
     */
    async function inputsOf(item, modelInputs) {
        const image = await pictureOf(item);
        const text = typeof item.prompt === 'string' ? item.prompt : render(item.prompt);
        const inputs = await (textFirst ? processor(text, image) : processor(image, text));
        modelInputs.prompt_ids = [...inputs.input_ids.data].map(Number);
        modelInputs.pixel_values = inputs.pixel_values;
        if (item.pixel_values) {
            inputs.pixel_values = await readTensor(item.pixel_values, files);
        }
        return inputs;
    }
    return { processor, inputsOf };
}
