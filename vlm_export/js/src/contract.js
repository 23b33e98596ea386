/** What transformers.js 4.3.1 loads, and how. Written by scripts/contract.py: change vlm_export/contract.py. */

export const MODEL_TYPES = Object.freeze({
    'vision-encoder-decoder': 'captioner',
    llava: 'chat',
    llava_onevision: 'chat',
    llava_qwen2: 'chat',
    idefics3: 'chat',
    smolvlm: 'chat',
    qwen2_vl: 'chat',
    qwen2_5_vl: 'chat',
    qwen3_vl: 'chat',
    glm_ocr: 'chat',
    mistral3: 'chat',
    lighton_ocr: 'chat',
    lfm2_vl: 'chat',
    paligemma: 'chat',
    gemma3: 'chat',
    florence2: 'tasks',
    prefix_conditioning_vlm: 'components',
    single_graph: 'single',
});
export const IMAGE_PROCESSORS = Object.freeze({
    SiglipImageProcessor: { cut: 'whole', text_first: false },
    ViTImageProcessor: { cut: 'whole', text_first: false },
    DeiTImageProcessor: { cut: 'whole', text_first: false },
    CLIPImageProcessor: { cut: 'whole', text_first: false },
    BitImageProcessor: { cut: 'whole', text_first: false },
    Idefics3ImageProcessor: { cut: 'tiles', text_first: true },
    SmolVLMImageProcessor: { cut: 'tiles', text_first: true },
    Gemma3ImageProcessor: { cut: 'whole', text_first: true },
    LlavaOnevisionImageProcessor: { cut: 'whole', text_first: false },
    PixtralImageProcessor: { cut: 'cells', text_first: false },
    Qwen2VLImageProcessor: { cut: 'patches', text_first: true },
    Glm46VImageProcessor: { cut: 'patches', text_first: true },
    VLMImageProcessor: { cut: 'whole', text_first: false },
    Lfm2VlImageProcessor: { cut: 'patched tiles', text_first: false },
});
export const GRID_TYPES = Object.freeze(['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'glm_ocr']);
export const NUMBERED_FROM_ONE = Object.freeze(['paligemma', 'gemma3']);
export const PROCESSORS = Object.freeze({
    PaliGemmaProcessor: { place: '', before: '', after: '', behind: '{bos_token}', end: '\n' },
    Gemma3Processor: { place: '{boi_token}', before: '\n\n{boi_token}', after: '{eoi_token}\n\n', behind: '', end: '' },
});
export const PREFIX = 'prefix_conditioning';
export const SUFFIXES = Object.freeze({
    fp32: '',
    fp16: '_fp16',
    int8: '_int8',
    uint8: '_uint8',
    q8: '_quantized',
    q4: '_q4',
    q2: '_q2',
    q1: '_q1',
    q4f16: '_q4f16',
    q2f16: '_q2f16',
    q1f16: '_q1f16',
    bnb4: '_bnb4',
});
export const SINGLE_OPTIONS = Object.freeze([
    'max_new_tokens',
    'repetition_penalty',
    'no_repeat_ngram_size',
    'min_new_tokens',
]);
export const SEARCH_OPTIONS = Object.freeze(['num_beams', 'length_penalty', 'early_stopping']);
export const SAMPLING_OPTIONS = Object.freeze(['temperature', 'top_k', 'top_p', 'seed']);
export const EARLY_STOPPING = Object.freeze([false, true, 'never']);
