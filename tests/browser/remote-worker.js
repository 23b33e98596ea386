import { load_from } from './vlm-export/index.js';
import { answer } from './vlm-export/worker.js';

load_from({ models: './', runtime: 'onnxruntime/' });
answer();
