/**
 * The graphs of a repo, each in a session of transformers.js.
 *
 * The model classes of transformers.js load fixed sets of graphs. Its base class loads the one that `model_file_name`
 * names, by the same rules: where files are looked for, caches, external data, execution providers. Dtypes and devices
 * are chosen here, by its rules too, so that none is replaced by a default without a word and a file that is not there
 * is named before anything is loaded.
 *
 * @typedef {import('@huggingface/transformers').Tensor} Tensor
 * @typedef {{ name: string, type: Tensor['type'], shape: (string | number)[] }} InputMetadata
 * @typedef {import('@huggingface/transformers').DeviceType} DeviceType
 * @typedef {import('@huggingface/transformers').ProgressCallback} ProgressCallback
 * @typedef {keyof typeof SUFFIXES} Dtype
 * @typedef {{ name: string, dtype: Dtype, device: DeviceType, files: string[] }} Choice
 * @typedef {PretrainedConfig[typeof CLIENT]} Client  What config.json asks of transformers.js.
 * @typedef {import('@huggingface/transformers').PretrainedModelOptions} ModelOptions
 */

/**
 * One for all graphs, or by their names.
 * @template {string} Value
 * @typedef {import('../index.d.ts').PerGraph<Value> | null | undefined} PerGraph
 */

import { LlamaForCausalLM, ModelRegistry, PreTrainedModel, PretrainedConfig, env } from '@huggingface/transformers';

import { SUFFIXES } from './contract.js';

const CLIENT = 'transformers.js_config';

export class Graph {
    #model;

    /**
     * @param {Choice} choice
     * @param {PreTrainedModel} model
     */
    constructor({ name, dtype, device }, model) {
        this.name = name;
        this.dtype = dtype;
        this.device = device;
        this.#model = model;
    }

    /** @returns {InputMetadata[]} */
    get inputs() {
        return this.#model.sessions.model.inputMetadata;
    }

    /**
     * @param {Record<string, Tensor | undefined>} feeds of which the graph takes those that it declares
     * @returns {Promise<Record<string, Tensor>>}
     */
    async run(feeds) {
        const missing = this.inputs.map(({ name }) => name).filter((name) => !feeds[name]);
        if (missing.length) {
            throw new Error(`${this.name}: there is nothing to feed ${missing.join(', ')} with`);
        }
        return await this.#model(feeds);
    }

    async dispose() {
        await this.#model.dispose();
    }
}

/**
 * Reports downloads: what transformers.js reports of each file, and as `progress_total` how far all graphs together are.
 */
export class Progress {
    /** @type {Record<string, { loaded: number, total: number }>} */
    #files = {};

    /** @param {ProgressCallback | null} callback */
    constructor(callback) {
        /** @type {ProgressCallback | undefined} */
        this.report = callback ? (info) => this.#pass(callback, info) : undefined;
    }

    /**
     * @param {string} file
     * @param {number | undefined} size in bytes
     */
    expect(file, size) {
        this.#files[file] = { loaded: 0, total: size ?? 0 };
    }

    /**
     * @param {ProgressCallback} callback
     * @param {import('@huggingface/transformers').ProgressInfo} info
     */
    #pass(callback, info) {
        if (info.status === 'progress_total') {
            return; // of one graph
        }
        callback(info);
        if (info.status !== 'progress' || !(info.file in this.#files)) {
            return;
        }
        this.#files[info.file] = { loaded: info.loaded, total: info.total };
        const counts = Object.values(this.#files);
        const loaded = counts.reduce((sum, count) => sum + count.loaded, 0);
        const total = counts.reduce((sum, count) => sum + count.total, 0);
        const progress = total > 0 ? (loaded / total) * 100 : 0;
        callback({
            status: 'progress_total',
            name: info.name,
            progress,
            loaded,
            total,
            files: structuredClone(this.#files),
        });
    }
}

/**
 * @param {string} id
 * @param {{ graphs: string[], decoders: string[] }} layout
 * @param {PretrainedConfig} config
 * @param {{
 *     dtype: PerGraph<string>, device: PerGraph<DeviceType>, revision: string, session_options: object,
 *     progress: Progress,
 * }} options
 * @returns {Promise<{ graphs: Record<string, Graph>, generation_config: Record<string, any> }>}
 */
export async function load_graphs(id, layout, config, { dtype, device, revision, session_options, progress }) {
    check_names({ dtype, device }, layout.graphs);
    const client = config[CLIENT] ?? {};
    const choices = layout.graphs.map((name) => choose(name, client, dtype, device));
    await expect_files(id, choices, revision, progress);

    const generates = layout.decoders.at(-1);
    /** @type {Record<string, Graph>} */
    const graphs = {};
    let generation_config = {};
    const loading = choices.map(async (choice) => {
        const { name, ...chosen } = choice;
        const keeps_cache = layout.decoders.includes(name) && chosen.device === 'webgpu' && 'gpu' in navigator;
        /** @type {ModelOptions} */
        const options = {
            ...chosen,
            model_file_name: name,
            revision,
            session_options: { ...session_options, ...(keeps_cache && { preferredOutputLocation: 'gpu-buffer' }) },
            progress_callback: progress.report,
        };
        const model = await (name === generates ? load_decoder : load_one)(id, client, options);
        graphs[name] = new Graph(choice, model);
        if (name === generates) {
            generation_config = { ...model.generation_config };
        }
    });
    const failed = (await Promise.allSettled(loading)).find((result) => result.status === 'rejected');
    if (failed) {
        await Promise.all(Object.values(graphs).map((graph) => graph.dispose()));
        throw failed.reason;
    }
    return { graphs, generation_config };
}

/** @type {(id: string, client: Client, options: ModelOptions) => Promise<PreTrainedModel>} */
async function load_one(id, client, options) {
    const config = { model_type: 'custom', architectures: ['PreTrainedModel'], [CLIENT]: client };
    return await PreTrainedModel.from_pretrained(id, { ...options, config: new PretrainedConfig(config) });
}

/**
 * The class of a decoder also reads generation_config.json; of one without layers it asks nothing else.
 * @type {typeof load_one}
 */
async function load_decoder(id, client, options) {
    const config = { model_type: 'llama', num_hidden_layers: 0, [CLIENT]: client };
    return await LlamaForCausalLM.from_pretrained(id, { ...options, config: new PretrainedConfig(config) });
}

/**
 * @param {Record<string, PerGraph<string>>} options
 * @param {string[]} graphs
 */
function check_names(options, graphs) {
    for (const [option, value] of Object.entries(options)) {
        const strange = value && typeof value === 'object' && Object.keys(value).find((name) => !graphs.includes(name));
        if (strange) {
            throw new TypeError(`${option}: there is no graph '${strange}' in this layout, but ${graphs.join(', ')}`);
        }
    }
}

/**
 * @param {string} name
 * @param {Client} client
 * @param {PerGraph<string>} dtype
 * @param {PerGraph<DeviceType>} device
 * @returns {Choice}
 */
function choose(name, client, dtype, device) {
    /** @type {<Value extends string>(value: PerGraph<Value>) => Value | undefined} */
    const of = (value) => (value && typeof value === 'object' ? value[name] : value) ?? undefined;
    const in_node = 'node' in /** @type {object} */ (env.backends.onnx.versions);
    const chosen_device = of(device) ?? of(client.device) ?? (in_node ? 'cpu' : 'wasm');
    const settings = { ...client, ...client.device_config?.[chosen_device] };
    const asked = of(dtype) === 'auto' ? undefined : of(dtype);
    const chosen_dtype = /** @type {Dtype} which is looked at below */ (
        asked ?? of(settings.dtype) ?? (chosen_device === 'wasm' ? 'q8' : 'fp32')
    );
    if (!Object.hasOwn(SUFFIXES, chosen_dtype)) {
        throw new TypeError(`dtype: there is no '${chosen_dtype}', but ${Object.keys(SUFFIXES).join(', ')}`);
    }
    return { name, dtype: chosen_dtype, device: chosen_device, files: files_of(name, chosen_dtype, settings) };
}

/**
 * @param {string} name
 * @param {Dtype} dtype
 * @param {Pick<Client, 'use_external_data_format'>} settings
 * @returns {string[]} the graph and the chunks of its external data
 */
function files_of(name, dtype, { use_external_data_format: external }) {
    const base = `${name}${SUFFIXES[dtype]}.onnx`;
    const chunks = Number(
        (external && typeof external === 'object' ? (external[base] ?? external[name]) : external) ?? 0,
    );
    const data = Array.from({ length: chunks }, (_, index) => `${base}_data${index ? `_${index}` : ''}`);
    return [base, ...data].map((file) => `onnx/${file}`);
}

/**
 * transformers.js waits for ever for a chunk that is not there, so all files are looked for first.
 * @param {string} id
 * @param {Choice[]} choices
 * @param {string} revision
 * @param {Progress} progress
 */
async function expect_files(id, choices, revision, progress) {
    /** @param {string} file */
    const look = async (file) => ({ file, ...(await ModelRegistry.get_file_metadata(id, file, { revision })) });
    for (const { name, dtype, files } of choices) {
        const found = await Promise.all(files.map(look));
        const missing = found.find(({ exists }) => !exists);
        if (missing) {
            const others = Object.entries(SUFFIXES).map(async ([other, suffix]) => {
                const { exists } = await look(`onnx/${name}${suffix}.onnx`);
                return exists && other !== dtype ? [other] : [];
            });
            const there = (await Promise.all(others)).flat().join(', ');
            throw new Error(`${id}: ${missing.file} is not there${there && ` (${name} is there as ${there})`}`);
        }
        found.forEach(({ file, size }) => progress.expect(file, size));
    }
}
