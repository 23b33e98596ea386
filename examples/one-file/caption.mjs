/** A caption of a picture, by ONNX Runtime alone: node caption.mjs model.onnx photo.jpg */

import { InferenceSession, Tensor } from 'onnxruntime-node';
import sharp from 'sharp';

const [model, photo] = process.argv.slice(2);
const { data, info } = await sharp(photo)
    .removeAlpha()
    .toColourspace('srgb')
    .raw()
    .toBuffer({ resolveWithObject: true });
const image = new Tensor('uint8', data, [info.height, info.width, 3]);
const options = new Tensor('float32', [], [0]);
const session = await InferenceSession.create(model, { logSeverityLevel: 3 });
const { texts } = await session.run({ image, options }, ['texts']);
console.log(new TextDecoder().decode(/** @type {Uint8Array} */ (texts.data)));
