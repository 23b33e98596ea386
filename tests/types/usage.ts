/** What users of vlm_export/js write. */

import { RawImage, type Tensor } from '@huggingface/transformers';
import type { GenerateOptions, Generated, Layout, Message, PastKeyValues, TokenReport } from 'vlm-export';
import { PrefixConditioningVLM, VisionLanguageModel, load_from } from 'vlm-export';
import { WorkerModel } from 'vlm-export/remote';
import { answer } from 'vlm-export/worker';

load_from({ runtime: '/onnxruntime/', models: new URL('https://example.org/models/') });
load_from({ runtime: { mjs: '/ort.mjs', wasm: '/ort.wasm' } });
const model = await VisionLanguageModel.from_pretrained('org/model', {
    dtype: { decoder_model_merged: 'q8' },
    device: 'webgpu',
    revision: 'main',
    progress_callback: (info) => info.status === 'progress_total' && console.log(info.progress),
    session_options: { graphOptimizationLevel: 'all' },
});
const prefix = await PrefixConditioningVLM.from_pretrained('org/model');
class Own extends VisionLanguageModel {}
const own = await Own.from_pretrained('org/model');

/** Not even `any` is the same as another type. */
type Same<One, Other> =
    (<Type>() => Type extends One ? 1 : 2) extends <Type>() => Type extends Other ? 1 : 2 ? true : false;
const same: [
    Same<typeof model, VisionLanguageModel>,
    Same<typeof prefix, PrefixConditioningVLM>,
    Same<typeof own, Own>,
    Same<Awaited<ReturnType<typeof model.generate>>, Generated>,
] = [true, true, true, true];

const layout: Layout = model.layout;
const facts: [boolean, boolean] = [model.takes_prompt, prefix.prefix_conditioning];
model.tokenizer('a cat').input_ids;
model.processor.image_processor;

const messages: Message[] = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: 'What is it?' }] }];
const options: GenerateOptions = {
    images: ['photo.jpg', new Blob(), await RawImage.read('photo.jpg')],
    messages,
    max_new_tokens: 30,
    min_new_tokens: 1,
    num_beams: 3,
    num_return_sequences: 3,
    length_penalty: 1.2,
    early_stopping: 'never',
    do_sample: true,
    temperature: 0.7,
    top_k: 50,
    top_p: 0.9,
    seed: 1,
    repetition_penalty: 1.1,
    no_repeat_ngram_size: 2,
    on_token: ({ token_id, text, tokens }: TokenReport) => console.log(token_id + tokens, text.length),
    signal: AbortSignal.timeout(1000),
};
const generated: Generated = await model.generate(options);
const [{ token_ids, text, score, finish_reason }] = generated;
const words: string[] = [text, finish_reason];
const numbers: (number | null)[] = [...token_ids, score, generated.timings.first_token_ms];

const features: Tensor = await model.project_vision_features(await model.encode_image('photo.jpg'));
const { logits, past_key_values } = await model.forward({ input_ids: [[1]], image_features: features });
const past: PastKeyValues = past_key_values;
await model.forward({ input_ids: logits, past_key_values: past });
await model.dispose();
answer();
const remote = await WorkerModel.from_pretrained(new Worker('worker.js'), 'org/model', { dtype: 'q8' });
const remotely: Generated = await remote.generate({
    image: new Blob(),
    num_beams: 3,
    signal: AbortSignal.timeout(1000),
});
await remote.dispose();
console.log(remotely, same, layout, facts, words, numbers);
