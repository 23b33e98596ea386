export { PrefixConditioningVLM, VisionLanguageModel } from './src/model.js';
export { load_from } from './src/places.js';
