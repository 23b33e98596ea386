/**
 * The rest of the interface: what is reported, what ends early, what is refused and by which name.
 *
 * @typedef {import('vlm-export').GenerateOptions} GenerateOptions
 * @typedef {import('vlm-export').TokenReport} TokenReport
 * @typedef {import('@huggingface/transformers').ProgressInfo} ProgressInfo
 * @typedef {Extract<ProgressInfo, { status: 'progress_total' }>} Total
 */

import assert from 'node:assert/strict';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { RawImage, env } from '@huggingface/transformers';
import { PrefixConditioningVLM, VisionLanguageModel } from 'vlm-export';

import { inputs_of, suite } from './suite.js';

/** @type {Record<string, VisionLanguageModel>} */
const models = {};
const { captioner, llava, components } = suite.repos;
const asked = await inputs_of(captioner.runs[0]);
const [expected] = captioner.runs[0].expected;
/** The captioner's picture: it is of the tower's size, so that nothing resizes it. */
const [image] = captioner.runs[0].images;

before(async () => {
    const names = ['captioner', 'chat', 'components', 'llava', 'idefics3', 'florence2'];
    /** @param {string} name */
    const load = async (name) => (models[name] = await VisionLanguageModel.from_pretrained(suite.repos[name].path));
    await Promise.all(names.map(load));
});
after(() => Promise.all(Object.values(models).map((model) => model.dispose())));

test('what a model says of itself', () => {
    const { captioner: model } = models;
    assert.deepEqual([model.layout, model.dtype, model.device], ['captioner', 'fp32', 'cpu']);
    assert.equal(model.config.model_type, 'vision-encoder-decoder');
    assert.equal(model.generation_config.max_new_tokens, 30);
    const facts = Object.entries(models).map(([name, { layout, takes_prompt, prefix_conditioning: prefix }]) => [
        name,
        layout,
        takes_prompt,
        prefix,
    ]);
    assert.deepEqual(facts.sort(), [
        ['captioner', 'captioner', false, true],
        ['chat', 'chat', true, true],
        ['components', 'components', true, true],
        ['florence2', 'tasks', true, false],
        ['idefics3', 'chat', true, false],
        ['llava', 'chat', true, false],
    ]);
});

test('an image in whatever form', async () => {
    const [greedy] = await models.captioner.generate({ image });
    const blob = new Blob([await readFile(image)]);
    for (const form of [await RawImage.read(image), blob]) {
        assert.deepEqual((await models.captioner.generate({ images: [form] }))[0], greedy);
    }
    assert.equal(
        greedy.text,
        models.captioner.tokenizer.decode(greedy.token_ids, { skip_special_tokens: true }).trim(),
    );
    assert.ok(greedy.text.split(' ').length > 5);
    assert.equal(greedy.finish_reason, 'stop');
    assert.equal(greedy.score, null);
});

test('graphs by hand: the greedy tokens', async () => {
    for (const [name, repo] of Object.entries({ captioner, components })) {
        const model = models[name];
        const { pixel_values } = await inputs_of(repo.runs[0]);
        const features = await model.encode_image(pixel_values);
        const image_features = await model.project_vision_features(features);
        assert.equal(image_features === features, name === 'captioner');
        const [greedy] = await model.generate({ pixel_values, max_new_tokens: 6 });
        const start = name === 'captioner' ? [Number(model.generation_config.decoder_start_token_id)] : [];
        let { logits, past_key_values } = await model.forward({ input_ids: [start], image_features });
        const token_ids = [];
        while (token_ids.length < greedy.token_ids.length) {
            const id = logits.data.indexOf(Math.max(...logits.data));
            token_ids.push(id);
            ({ logits, past_key_values } = await model.forward({ input_ids: [[id]], image_features, past_key_values }));
        }
        assert.deepEqual(token_ids, greedy.token_ids);
    }
});

test('a task about one image', async () => {
    const { florence2: model } = models;
    const { runs } = suite.repos.florence2;
    const asks = await inputs_of(runs[0]);
    const grounding = '<CAPTION_TO_PHRASE_GROUNDING>';
    /** @param {string} prompt */
    const said = async (prompt) => (await model.generate({ ...asks, prompt }))[0];
    const plain = await said(`${grounding}a cat`);
    assert.deepEqual(await said(` ${grounding}  a cat `), plain);
    assert.deepEqual(await said('Locate the phrases in the caption: a cat'), plain);
    assert.notDeepEqual((await said('<OD>')).token_ids, []);
    const kept = model.tokenizer.decode(plain.token_ids, { skip_special_tokens: false });
    assert.equal(plain.text, kept.replaceAll('</s>', '').trim());
    for (const [options, message] of /** @type {[GenerateOptions, RegExp][]} */ ([
        [{ prompt: ' ' }, /layout tasks needs a prompt: a task, such as <CAPTION>/],
        [{ prompt: '<CAPTION> of a cat' }, /<CAPTION> takes no input/],
        [{ prompt: undefined, messages: [] }, /does one task about one image: give prompt/],
        [{ pixel_values: undefined, images: [image, image] }, /takes one image, not 2/],
    ])) {
        await assert.rejects(model.generate({ ...asks, ...options }), message);
    }
    await assert.rejects(model.forward({ input_ids: [[1]] }), /image_features: layout tasks needs/);
});

test('the text as it grows', async () => {
    /** @type {TokenReport[]} */
    const reports = [];
    const made = await models.captioner.generate({ ...asked, on_token: (report) => reports.push(report) });
    assert.deepEqual(
        reports.map(({ token_id }) => token_id),
        made[0].token_ids,
    );
    assert.deepEqual(
        reports.map(({ tokens }) => tokens),
        [...reports.keys()].map((index) => index + 1),
    );
    assert.equal(reports.at(-1)?.text, made[0].text);
    assert.ok(reports.every(({ text }) => made[0].text.startsWith(text)));
    const { first_token_ms, total_ms, tokens } = made.timings;
    assert.ok(first_token_ms !== null && 0 < first_token_ms && first_token_ms <= total_ms);
    assert.equal(tokens, made[0].token_ids.length);
});

test('beams as they grow: the last report is the answer', async () => {
    /** @type {TokenReport[]} */
    const reports = [];
    const [best] = await models.captioner.generate({
        ...asked,
        num_beams: 3,
        on_token: (report) => reports.push(report),
    });
    assert.deepEqual(best.token_ids, expected.token_ids);
    assert.equal(reports.at(-1)?.text, best.text);
    assert.ok(reports.length >= best.token_ids.length);
});

for (const options of [
    {},
    { num_beams: 3, num_return_sequences: 2 },
    { do_sample: true, num_return_sequences: 2, seed: 1 },
]) {
    test(`cancelled, and used again: ${JSON.stringify(options)}`, async () => {
        const controller = new AbortController();
        /** @param {TokenReport} report */
        const on_token = ({ tokens }) => tokens === 3 && controller.abort();
        const made = await models.captioner.generate({ ...asked, ...options, on_token, signal: controller.signal });
        assert.equal(made.length, options.num_return_sequences ?? 1);
        made.forEach(({ finish_reason, token_ids }) => {
            assert.equal(finish_reason, 'cancelled');
            assert.equal(token_ids.length, 3);
        });
        const before_it_began = await models.captioner.generate({ ...asked, ...options, signal: AbortSignal.abort() });
        assert.equal(before_it_began[0].text, '');
        assert.equal(before_it_began[0].finish_reason, 'cancelled');
        assert.equal(before_it_began.timings.first_token_ms, null);
        const [again] = await models.captioner.generate({ ...asked, num_beams: 3 });
        assert.deepEqual(again.token_ids, expected.token_ids);
    });
}

test('two at once', async () => {
    const one = models.captioner.generate({ ...asked, num_beams: 3 });
    const other = models.captioner.generate(asked);
    assert.deepEqual((await one)[0].token_ids, expected.token_ids);
    assert.equal((await other)[0].finish_reason, 'stop');
});

test('sampling: repeatable, various, and for one token greedy', async () => {
    /** @param {GenerateOptions} options */
    const ids = async (options) =>
        (await models.captioner.generate({ ...asked, do_sample: true, ...options })).map((s) => s.token_ids);
    const hot = { temperature: 3, top_k: 0, num_return_sequences: 4 };
    const first = await ids({ ...hot, seed: 5 });
    assert.deepEqual(await ids({ ...hot, seed: 5 }), first);
    assert.notDeepEqual(await ids({ ...hot, seed: 6 }), first);
    assert.equal(new Set(first.map(String)).size, 4);
    const [greedy] = await models.captioner.generate(asked);
    assert.deepEqual(await ids({ top_k: 1, seed: 1 }), [greedy.token_ids]);
    assert.deepEqual(await ids({ top_p: 1e-6, top_k: 0, seed: 1 }), [greedy.token_ids]);
    const beams = await ids({ num_beams: 3, num_return_sequences: 3, seed: 2, temperature: 2 });
    assert.equal(beams.length, 3);
    assert.deepEqual(await ids({ num_beams: 3, num_return_sequences: 3, seed: 2, temperature: 2 }), beams);
});

test('each sample goes on from its own tokens, while others end', async () => {
    const options = { ...asked, do_sample: true, temperature: 9, top_k: 3, num_return_sequences: 4, seed: 7 };
    const made = await models.captioner.generate(options);
    assert.ok(new Set(made.map(({ token_ids }) => token_ids.length)).size > 2);
    for (const { token_ids } of made) {
        assert.ok(Math.max(...(await ranks(models.captioner, token_ids))) < options.top_k);
    }
});

/**
 * How many tokens the model prefers to each of these, after those before it.
 * @type {(model: VisionLanguageModel, token_ids: number[]) => Promise<number[]>}
 */
async function ranks(model, token_ids) {
    const image_features = await model.encode_image(asked.pixel_values);
    const input_ids = [[Number(model.generation_config.decoder_start_token_id)]];
    let { logits, past_key_values } = await model.forward({ input_ids, image_features });
    const found = [];
    for (const id of token_ids) {
        const scores = /** @type {Float32Array} */ (logits.data);
        found.push(scores.filter((score) => score > scores[id]).length);
        ({ logits, past_key_values } = await model.forward({ input_ids: [[id]], image_features, past_key_values }));
    }
    return found;
}

test('conversations: the template, or none, and no image', async () => {
    const { llava: model } = models;
    const [[first], [second]] = [llava.runs[0].images, llava.runs[llava.runs.length - 1].images];
    /** @param {GenerateOptions} options */
    const say = async (options) => (await model.generate({ max_new_tokens: 5, ...options }))[0].token_ids;
    /** @type {import('vlm-export').Message['content']} */
    const content = [{ type: 'image' }, { type: 'text', text: 'what is it?' }];
    const messages = [{ role: 'user', content }];
    const rendered = 'user: <image>what is it?assistant:';
    const one = await say({ image: first, messages });
    assert.deepEqual(await say({ image: first, prompt: rendered }), one);
    assert.deepEqual(await say({ image: first, prompt: 'what is it?' }), one);
    assert.notDeepEqual(await say({ image: second, messages }), one);
    assert.equal((await say({ prompt: 'hello' })).length, 5);
});

/** @type {[layout: string, options: any, message: RegExp][]} */
const refused = [
    ['captioner', { num_beam: 3 }, /generate\(\) has no option 'num_beam'; it has .*num_beams/],
    ['captioner', { prompt: 'a' }, /layout captioner takes no prompt/],
    ['captioner', { messages: [] }, /layout captioner takes no prompt/],
    ['captioner', { images: [image, image], pixel_values: undefined }, /takes one image, not 2/],
    ['captioner', { images: undefined, pixel_values: undefined }, /needs an image: give image or pixel_values/],
    ['captioner', { image }, /images: give image or images, not both/],
    ['captioner', { num_beams: 0 }, /num_beams: must be an integer, at least 1, not 0/],
    ['captioner', { num_beams: '3' }, /num_beams: must be an integer, at least 1, not "3"/],
    ['captioner', { early_stopping: 'always', num_beams: 2 }, /early_stopping: must be true, false or 'never'/],
    ['captioner', { num_return_sequences: 2 }, /num_return_sequences: 2 takes as many num_beams, not 1/],
    ['captioner', { num_beams: 2, num_return_sequences: 3, do_sample: true }, /num_return_sequences: 3 takes/],
    ['captioner', { temperature: 0.5 }, /temperature: does something only with do_sample/],
    ['captioner', { temperature: 0, do_sample: true }, /temperature: must be a number above 0, not 0/],
    ['captioner', { length_penalty: 2 }, /length_penalty: does something only with num_beams/],
    ['captioner', { min_new_tokens: 9, max_new_tokens: 8 }, /min_new_tokens: 9 is more than max_new_tokens, 8/],
    ['captioner', { on_token: true }, /on_token: must be a function/],
    ['components', { messages: [] }, /layout components continues a prompt/],
    ['llava', { prompt: 'a', messages: [] }, /give prompt or messages, not both/],
    ['llava', { prompt: '<image> <image>' }, /the prompt has 2 image tokens <image> for 1 images/],
    ['idefics3', { images: undefined, prompt: '<image>' }, /pixel_values: give image too/],
];
for (const [name, options, message] of refused) {
    test(`refused by layout of ${name}: ${message.source}`, async () => {
        const inputs = { ...(await inputs_of({ ...suite.repos[name].runs[0], prompt: null })), ...options };
        await assert.rejects(models[name].generate(inputs), { message });
    });
}

test('the types name the options that there are', async () => {
    const types = await readFile(new URL('../index.d.ts', import.meta.url), 'utf-8');
    /** @param {string} name */
    const typed = (name) => {
        const found = types.match(new RegExp(`interface ${name} \\{\n(.*?)\n\\}`, 's'));
        const [, body] = /** @type {RegExpMatchArray} */ (found);
        return [...body.matchAll(/^ {4}(\w+)\??:/gm)].map(([, option]) => option).sort();
    };
    /** @param {Promise<unknown>} call */
    const known = async (call) => {
        const error = /** @type {Error} */ (await call.catch((thrown) => thrown));
        return error.message.split('it has ')[1].split(', ').sort();
    };
    // @ts-expect-error there is no such option
    assert.deepEqual(typed('GenerateOptions'), await known(models.captioner.generate({ none: 1 })));
    // @ts-expect-error there is no such option
    assert.deepEqual(typed('LoadOptions'), await known(VisionLanguageModel.from_pretrained('', { none: 1 })));
});

test('what forward() is not fed is named', async () => {
    await assert.rejects(
        models.captioner.forward({ input_ids: [[1]] }),
        /decoder_model_merged: .* encoder_hidden_states/,
    );
    // @ts-expect-error there is no such input
    await assert.rejects(models.captioner.forward({ ids: [[1]] }), /forward\(\) has no option 'ids'/);
    const image_features = await models.llava.encode_image(image);
    await assert.rejects(models.llava.forward({ input_ids: [[1, 2]], image_features }), /0 image tokens for \d+ rows/);
});

/** @type {[options: any, message: RegExp][]} */
const not_loaded = [
    [{ dtyp: 'q8' }, /from_pretrained\(\) has no option 'dtyp'/],
    [{ dtype: 'int3' }, /dtype: there is no 'int3', but fp32, /],
    [
        { dtype: { decoder: 'fp32' } },
        /dtype: there is no graph 'decoder' in this layout, but encoder_model, decoder_model/,
    ],
    [{ device: 'gpu9' }, /Unsupported device: "gpu9"/],
    [{ dtype: 'q4' }, /onnx\/encoder_model_q4\.onnx is not there \(encoder_model is there as fp32\)/],
];
for (const [options, message] of not_loaded) {
    test(`not loaded: ${message.source}`, async () => {
        await assert.rejects(VisionLanguageModel.from_pretrained(captioner.path, options), { message });
    });
}

test('a repo that lacks something, or is of another kind', async (context) => {
    const root = await mkdtemp(join(tmpdir(), 'vlm-export-'));
    context.after(() => rm(root, { recursive: true }));
    /** @type {(file: string, spoil: (path: string) => Promise<void>) => Promise<string>} */
    const spoilt = async (file, spoil) => {
        const folder = await mkdtemp(join(root, 'repo-'));
        await cp(captioner.path, folder, { recursive: true });
        await spoil(join(folder, file));
        return folder;
    };
    /** @type {(changes: object) => (file: string) => Promise<void>} */
    const edit = (changes) => async (file) =>
        writeFile(file, JSON.stringify({ ...JSON.parse(await readFile(file, 'utf-8')), ...changes }));
    /** @type {(folder: Promise<string>, message: RegExp) => Promise<void>} */
    const refuses = async (folder, message) =>
        assert.rejects(VisionLanguageModel.from_pretrained(await folder), { message });

    await refuses(spoilt('onnx/decoder_model_merged.onnx', rm), /onnx\/decoder_model_merged\.onnx is not there$/);
    const chunks = { 'transformers.js_config': { use_external_data_format: { 'encoder_model.onnx': 2 } } };
    await refuses(spoilt('config.json', edit(chunks)), /onnx\/encoder_model\.onnx_data is not there/);
    await refuses(spoilt('config.json', edit({ model_type: 'bert' })), /model_type 'bert' is of no layout known here/);
    const banning = await spoilt('generation_config.json', edit({ sequence_bias: [[[1], 1.5]] }));
    const model = await VisionLanguageModel.from_pretrained(banning);
    await assert.rejects(
        model.generate(asked),
        /generation_config\.json: 'sequence_bias' would change what is generated/,
    );
    await model.dispose();
});

test('a prefix-conditioning model is told from others', async () => {
    const model = await PrefixConditioningVLM.from_pretrained(captioner.path);
    assert.ok(model instanceof PrefixConditioningVLM && model instanceof VisionLanguageModel);
    assert.deepEqual((await model.generate({ ...asked, num_beams: 3 }))[0].token_ids, expected.token_ids);
    await model.dispose();
    await assert.rejects(PrefixConditioningVLM.from_pretrained(llava.path), /not a prefix-conditioning model/);
});

test('downloads are reported, of every layout', async (context) => {
    const elsewhere = new Set();
    const server = createServer(async ({ url = '' }, response) => {
        const [, name, , revision, ...rest] = decodeURIComponent(url).split('/');
        if (revision !== 'v1') elsewhere.add(rest.join('/'));
        const body = await readFile(join(suite.repos[name]?.path ?? '/none', ...rest)).catch(() => null);
        response.writeHead(body ? 200 : 404, { 'content-length': body?.length ?? 0 }).end(body);
    });
    await new Promise((resolve) => server.listen(0, '127.0.0.1', () => resolve(undefined)));
    const { port } = /** @type {import('node:net').AddressInfo} */ (server.address());
    /** @type {Map<string, ArrayBuffer>} */
    const bodies = new Map();
    /** @type {typeof env.customCache} */
    const customCache = {
        match: async (key) => (bodies.has(key) ? new Response(bodies.get(key)) : undefined),
        put: async (key, response) => void bodies.set(key, await response.arrayBuffer()),
    };
    const settings = { ...env };
    context.after(() => {
        Object.assign(env, settings);
        server.close();
        server.closeAllConnections();
    });
    Object.assign(env, {
        allowRemoteModels: true,
        allowLocalModels: false,
        remoteHost: `http://127.0.0.1:${port}/`,
        useCustomCache: true,
        customCache,
    });
    for (const name of ['captioner', 'chat', 'components']) {
        /** @type {Total[]} */
        const totals = [];
        const files = new Set();
        /** @param {ProgressInfo} info */
        const progress_callback = (info) => {
            if ('file' in info) files.add(info.file);
            if (info.status === 'progress_total') totals.push(info);
        };
        const model = await VisionLanguageModel.from_pretrained(name, { revision: 'v1', progress_callback });
        const end = totals[totals.length - 1];
        const graphs = Object.keys(end.files);
        assert.equal(graphs.length, { captioner: 2, chat: 3, components: 5 }[name]);
        [...graphs, 'config.json', 'generation_config.json', 'tokenizer.json', 'preprocessor_config.json'].forEach(
            (file) => assert.ok(files.has(file), `${name}: ${file}`),
        );
        totals.reduce((previous, { loaded, total }) => {
            assert.ok(previous <= loaded && loaded <= total && total === totals[0].total);
            return loaded;
        }, 0);
        assert.equal(end.progress, 100);
        const { pixel_values } = await inputs_of(suite.repos[name].runs[0]);
        assert.ok((await model.generate({ pixel_values, max_new_tokens: 2 }))[0].token_ids.length);
        await model.dispose();
    }
    assert.deepEqual([...elsewhere], ['tokenizer_config.json'], 'transformers.js looks whether main has it');
});
