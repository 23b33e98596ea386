/**
 * A decoder's cache: tensors by the names of the graph's inputs. Keys and values of attention layers are
 * `[batch, kv_heads, tokens, head_dim]`; other layers keep a state of one size, `past_conv.0` `[batch, …]`.
 *
 * @typedef {import('./graphs.js').Graph} Graph
 * @typedef {import('onnxruntime-common').TensorConstructor} TensorConstructor
 * @typedef {Record<string, Tensor>} Cache
 */

import { Tensor, env } from '@huggingface/transformers';

const PAST = 'past_';
const PAST_OF_ATTENTION = 'past_key_values';
const CROSS = '.encoder.'; // of the image: the same in every row, and for every token
/** @type {Record<string, Float32ArrayConstructor | Float16ArrayConstructor | Uint16ArrayConstructor>} of their numbers */
const TYPES = {
    float32: Float32Array,
    float16: globalThis.Float16Array ?? Uint16Array,
};

/**
 * The cache before the first token: the symbol `batch_size` is the batch, any other symbol 0.
 * @param {Graph} decoder
 * @param {number} batch
 * @returns {Cache}
 */
export function empty_cache(decoder, batch) {
    const entries = decoder.inputs
        .filter(({ name }) => name.startsWith(PAST))
        .map(({ name, type, shape }) => {
            const dims = shape.map((size) => (typeof size === 'number' ? size : size === 'batch_size' ? batch : 0));
            const size = dims.reduce((product, size) => product * size, 1);
            return [name, new Tensor(type, new TYPES[type](size), dims)];
        });
    return Object.fromEntries(entries);
}

/**
 * @param {Cache} cache
 * @returns {number} how many tokens it holds
 */
export function past_length(cache) {
    const of_attention = Object.keys(cache).filter((key) => key.startsWith(PAST_OF_ATTENTION));
    const name = /** @type {string} */ (of_attention.find((key) => !key.includes(CROSS)));
    return cache[name].dims[2];
}

/**
 * The cache after a run. What held the image's keys and values before stays as it is.
 * @param {Record<string, Tensor>} outputs of the decoder
 * @param {Cache} past what it was fed
 * @returns {Cache}
 */
export function next_cache(outputs, past) {
    /** @type {Cache} */
    const cache = {};
    for (const [output, tensor] of Object.entries(outputs)) {
        if (!output.startsWith('present')) {
            continue;
        }
        const name = output.startsWith('present.')
            ? output.replace('present', PAST_OF_ATTENTION)
            : output.replace('present_', PAST);
        const keep = name.includes(CROSS) && past[name]?.dims[2] > 0;
        cache[name] = keep ? past[name] : tensor;
        release(keep ? tensor : past[name]);
    }
    return cache;
}

/** @param {Cache} cache that no run needs any more */
export function release_cache(cache) {
    Object.values(cache).forEach(release);
}

/**
 * What transformers.js leaves on the GPU must be given back; everything else is collected.
 * @param {Tensor | undefined} tensor
 */
function release(tensor) {
    if (tensor?.location === 'gpu-buffer') {
        tensor.dispose();
    }
}

/**
 * The cache whose row `i` is row `rows[i]` of this one, which is used up: where as many rows are wanted as there are,
 * they change places in its own memory.
 * @param {Cache} cache
 * @param {number[]} rows
 * @returns {Promise<Cache>}
 */
export async function select_rows(cache, rows) {
    const batch = Object.values(cache)[0].dims[0];
    const same_count = rows.length === batch;
    if (same_count && rows.every((row, index) => row === index)) {
        return cache;
    }
    const moves = same_count ? plan_moves(rows) : null;
    /** @type {Cache} */
    const selected = {};
    for (const [name, tensor] of Object.entries(cache)) {
        if (same_count && name.includes(CROSS)) {
            selected[name] = tensor;
        } else if (tensor.location === 'gpu-buffer') {
            selected[name] = await copy_rows_on_gpu(tensor, rows);
        } else {
            selected[name] = moves ? move_rows(tensor, moves) : copy_rows(tensor, rows);
        }
    }
    return selected;
}

/**
 * @param {Tensor} tensor `[batch, …]`
 * @param {number[]} rows
 * @returns {Tensor} `[rows, …]`
 */
export function copy_rows(tensor, rows) {
    const [batch, ...rest] = tensor.dims;
    const all = numbers_of(tensor);
    const length = all.length / batch;
    const data = new /** @type {Float32ArrayConstructor} */ (all.constructor)(rows.length * length);
    rows.forEach((row, index) => data.set(all.subarray(row * length, (row + 1) * length), index * length));
    return new Tensor(tensor.type, data, [rows.length, ...rest]);
}

/**
 * The copies, in an order in which none reads what another has overwritten, that bring row `rows[i]` to place `i`.
 * @param {number[]} rows
 * @returns {[to: number, from: number][]} -1 is a spare place
 */
export function plan_moves(rows) {
    /** @type {[to: number, from: number][]} */
    const moves = [];
    const waiting = new Map(
        rows.map((from, to) => /** @type {const} */ ([to, from])).filter(([to, from]) => to !== from),
    );
    while (waiting.size) {
        const needed = new Set(waiting.values());
        const free = [...waiting.keys()].find((to) => !needed.has(to));
        if (free !== undefined) {
            moves.push([free, /** @type {number} */ (waiting.get(free))]);
            waiting.delete(free);
            continue;
        }
        // Only circles are left: one of their rows goes aside.
        const [to] = waiting.keys();
        moves.push([-1, to]);
        waiting.forEach((from, place) => from === to && waiting.set(place, -1));
    }
    return moves;
}

/**
 * @param {Tensor} tensor
 * @returns {Float32Array} or, of float16, as many numbers of 16 bits
 */
function numbers_of({ data }) {
    return /** @type {Float32Array} */ (data);
}

/**
 * @param {Tensor} tensor
 * @param {[to: number, from: number][]} moves
 */
function move_rows(tensor, moves) {
    const data = numbers_of(tensor);
    const length = data.length / tensor.dims[0];
    /** @type {Float32Array | null} */
    let spare = null;
    for (const [to, from] of moves) {
        /** @type {Float32Array} */
        const row =
            from === -1 ? /** @type {Float32Array} */ (spare) : data.subarray(from * length, (from + 1) * length);
        if (to === -1) {
            spare = row.slice();
        } else {
            data.set(row, to * length);
        }
    }
    return tensor;
}

/**
 * @param {Tensor} tensor in a GPU buffer, which is given back
 * @param {number[]} rows
 * @returns {Promise<Tensor>}
 */
async function copy_rows_on_gpu(tensor, rows) {
    const { ort_tensor } = tensor;
    const device = await /** @type {Required<typeof env.backends.onnx>} */ (env.backends.onnx).webgpu.device;
    const [batch, ...rest] = tensor.dims;
    const row_bytes = (tensor.size / batch) * TYPES[tensor.type].BYTES_PER_ELEMENT;
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    const buffer = device.createBuffer({ size: Math.ceil((rows.length * row_bytes) / 16) * 16, usage });
    const commands = device.createCommandEncoder();
    rows.forEach((row, index) =>
        commands.copyBufferToBuffer(ort_tensor.gpuBuffer, row * row_bytes, buffer, index * row_bytes, row_bytes),
    );
    device.queue.submit([commands.finish()]);
    const copied = /** @type {TensorConstructor} */ (ort_tensor.constructor).fromGpuBuffer(buffer, {
        dataType: /** @type {'float32' | 'float16'} */ (tensor.type),
        dims: [rows.length, ...rest],
        dispose: () => buffer.destroy(),
    });
    tensor.dispose();
    return new Tensor(copied);
}
