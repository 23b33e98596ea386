import { VisionLanguageModel } from 'vlm-export';

const [repo, image] = process.argv.slice(2);
const model = await VisionLanguageModel.from_pretrained(repo, { dtype: 'fp32' });
const [best] = await model.generate({ image });
console.log(best.text);
await model.dispose();
