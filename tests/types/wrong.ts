/** What users of vlm_export/js must not write; beside each line what the compiler says of it. */

import type { GenerateOptions, LoadOptions } from 'vlm-export';
import { type PrefixConditioningVLM, VisionLanguageModel, load_from } from 'vlm-export';
import { WorkerModel } from 'vlm-export/remote';

const model = await VisionLanguageModel.from_pretrained('org/model');
const [sequence] = await model.generate({ image: 'photo.jpg' });

// A misspelt name.
await model.generate({ image: 'photo.jpg', num_beam: 3 }); // TS2561: Did you mean to write 'num_beams'?
await VisionLanguageModel.from_pretrained('org/model', { dtyp: 'q8' }); // TS2561: Did you mean to write 'dtype'?
await model.forward({ input_id: [[1]] }); // TS2561: Did you mean to write 'input_ids'?
model.generated(); // TS2551: Did you mean 'generate'?
sequence.tokens; // TS2339: Property 'tokens' does not exist on type 'Sequence'.

// A value of another type.
await model.generate({ early_stopping: 'always' }); // TS2322: Type '"always"' is not assignable to type 'boolean | "never" | undefined'.
await model.generate({ max_new_tokens: '30' }); // TS2322: Type 'string' is not assignable to type 'number'.
await model.generate({ bad_words_ids: [1] }); // TS2322: Type 'number' is not assignable to type 'number[]'.
await model.generate({ image: 1 }); // TS2322: Type 'number' is not assignable to type 'ImageInput | undefined'.
await model.generate({ on_token: (text: string) => text }); // TS2322: Type '(text: string) => string' is not assignable to
await model.generate('photo.jpg'); // TS2559: has no properties in common with type 'GenerateOptions'.
await VisionLanguageModel.from_pretrained('org/model', { dtype: 8 }); // TS2322: Type 'number' is not assignable to type
await VisionLanguageModel.from_pretrained('org/model', { device: 'tpu' }); // TS2322: Type '"tpu"' is not assignable to type
load_from({ runtime: { wasm: '/ort.wasm' } }); // TS2322: Type '{ wasm: string; }' is not assignable to type
load_from({ model: '/models/' }); // TS2561: Did you mean to write 'models'?
await WorkerModel.from_pretrained('worker.js', 'org/model'); // TS2345: Argument of type 'string' is not assignable to parameter of type 'Worker'.
const loading: LoadOptions = { revision: 1 }; // TS2322: Type 'number' is not assignable to type 'string'.

// What comes back, as something else.
const text: string = await model.generate(); // TS2322: Type 'Generated' is not assignable to type 'string'.
const name: number = model; // TS2322: Type 'VisionLanguageModel' is not assignable to type 'number'.
const options: GenerateOptions = model; // TS2559: Type 'VisionLanguageModel' has no properties in common
const prefix: PrefixConditioningVLM = model; // TS2322: Type 'VisionLanguageModel' is not assignable to type 'PrefixConditioningVLM'.
sequence.score.toFixed(); // TS18047: 'sequence.score' is possibly 'null'.
VisionLanguageModel.from_pretrained('org/model').generate(); // TS2339: Property 'generate' does not exist on type 'Promise<VisionLanguageModel>'.
model.layout = 'chat'; // TS2540: Cannot assign to 'layout' because it is a read-only property.

// Something missing.
await VisionLanguageModel.from_pretrained(); // TS2554: Expected 1-2 arguments, but got 0.
await model.encode_image(); // TS2554: Expected 1 arguments, but got 0.
await model.forward({}); // TS2345: Property 'input_ids' is missing in type '{}'
new VisionLanguageModel(); // TS2674: Constructor of class 'VisionLanguageModel' is protected

console.log(loading, text, name, options, prefix);
