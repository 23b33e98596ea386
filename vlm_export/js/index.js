export { PrefixConditioningVLM, VisionLanguageModel } from './src/model.js';
