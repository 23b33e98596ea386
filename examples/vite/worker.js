// Vite copies the two files of the runtime and gives their addresses.
import mjs from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url';
import wasm from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url';
import { load_from } from 'vlm-export';
import { answer } from 'vlm-export/worker';

// What is built of this file lies in assets/, the models beside the page.
load_from({ models: new URL('../models/', import.meta.url), runtime: { mjs, wasm } });
answer();
