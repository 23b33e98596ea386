import type {
    DeviceType,
    PreTrainedTokenizer,
    PretrainedConfig,
    Processor,
    ProgressCallback,
    RawImage,
    Tensor,
} from '@huggingface/transformers';

export type Layout = 'captioner' | 'chat' | 'tasks' | 'components';
/** For all graphs, or by their names. */
export type PerGraph<Value> = Value | Record<string, Value>;
/** Whatever `RawImage.read` takes: a path, an address, a file that was dropped, … */
export type ImageInput = RawImage | string | URL | Blob;
/** transformers' conversation form. */
export interface Message {
    role: string;
    content: string | ({ type: 'image' } | { type: 'text'; text: string })[];
}
/** By `past_key_values.*` names, `[batch, kv_heads, tokens, head_dim]` each. */
export type PastKeyValues = Record<string, Tensor>;

export interface Places {
    /** The folder in which repos lie by their ids, in place of the Hub. */
    models?: string | URL;
    /** The folder with the files of `onnxruntime-web/dist`, or the addresses of the two that are loaded, of one build. */
    runtime?: string | URL | { mjs: string | URL; wasm: string | URL };
}
/**
 * Says where files come from; addresses are relative to the page, or to a worker's script. In a browser nothing is loaded
 * before the runtime's place is said: transformers.js would take it from a CDN.
 */
export function load_from(places: Places): void;

export interface LoadOptions {
    /** Else what the repo asks for, else q8 on WASM and fp32 elsewhere. */
    dtype?: PerGraph<string> | null;
    /** Else what the repo asks for, else wasm in a browser and cpu in Node. */
    device?: PerGraph<DeviceType> | null;
    /** Of a repo on the Hub; main. */
    revision?: string;
    /** Gets transformers.js' reports on each file, and `progress_total` on all graphs together. */
    progress_callback?: ProgressCallback | null;
    /** Of ONNX Runtime. */
    session_options?: object;
}

export interface TokenReport {
    token_id: number;
    /** The whole text so far. */
    text: string;
    /** How many tokens that is. */
    tokens: number;
}

export interface GenerateOptions {
    image?: ImageInput;
    /** Layout chat. */
    images?: ImageInput[];
    /**
     * What the processor would make of the images, `[images, 3, height, width] float32`, or of tiles. Of an image beside it
     * only the size counts, where the model takes tiles.
     */
    pixel_values?: Tensor;
    /**
     * Not in layout captioner. In chat, a text without image tokens is a user's message after the images. In tasks, a task
     * such as `<OD>`, with its input behind it where it has one; answers hold places as tokens such as `<loc_999>`, which
     * `processor.post_process_generation(text, task, [width, height])` makes boxes of.
     */
    prompt?: string;
    /** Layout chat. */
    messages?: Message[];
    /** 20 unless the repo says otherwise. */
    max_new_tokens?: number;
    min_new_tokens?: number;
    /** Above 1: beam search, or beam sampling with `do_sample`. */
    num_beams?: number;
    /** Up to `num_beams`, or any number with `do_sample` alone. */
    num_return_sequences?: number;
    /** Power of the length that a beam's log-probability is divided by. */
    length_penalty?: number;
    /** Whether to stop when `num_beams` texts have ended; `false` and `'never'` look whether a better one may come. */
    early_stopping?: boolean | 'never';
    do_sample?: boolean;
    temperature?: number;
    /** 0 is all; 50 unless the repo says otherwise. */
    top_k?: number;
    top_p?: number;
    /** Makes sampling repeatable: of Python's Mersenne Twister (`random.Random` of transformers.js). */
    seed?: number;
    repetition_penalty?: number;
    no_repeat_ngram_size?: number;
    /** As `min_new_tokens`, but counts the prompt, its image tokens included. */
    min_length?: number;
    /** Ids that must not follow one another so. */
    bad_words_ids?: number[][] | null;
    /** Ids that cannot come; of `begin_…`, not as the first. */
    suppress_tokens?: number[] | null;
    begin_suppress_tokens?: number[] | null;
    /** The id behind a start token that stands alone. */
    forced_bos_token_id?: number | null;
    /** The id, or one of those, that comes last where the length runs out. */
    forced_eos_token_id?: number | number[] | null;
    /**
     * Called after each step, of the first sequence. Of beams it is the best one that goes on, whose earlier words may
     * change from call to call, and in the end the answer.
     */
    on_token?: (report: TokenReport) => void;
    /** Ends generation after the step that runs: what there is comes back with the finish reason `cancelled`. */
    signal?: AbortSignal;
}

export interface Sequence {
    /** Without the prompt, up to and including the token that ended it. */
    token_ids: number[];
    /** Without special tokens, and without white space around it. */
    text: string;
    /** Of a beam: its log-probability, divided by its length to the power of `length_penalty`. */
    score: number | null;
    finish_reason: 'stop' | 'length' | 'cancelled';
}

export interface Timings {
    /** From the call to the first token; null if there was none. */
    first_token_ms: number | null;
    total_ms: number;
    /** Of the best sequence. */
    tokens: number;
}

/** Best first. */
export type Generated = Sequence[] & { timings: Timings };

/** A repo that vlm-export made, of any layout, loaded and ready to be run. */
export class VisionLanguageModel {
    /** Gives a model of the class that it is called on. */
    static from_pretrained<Model extends VisionLanguageModel>(
        this: { readonly prototype: Model },
        id: string,
        options?: LoadOptions,
    ): Promise<Model>;
    /** Use `from_pretrained`. */
    protected constructor();

    readonly layout: Layout;
    /** Whether `generate()` takes a prompt. */
    readonly takes_prompt: boolean;
    /** Whether the decoder continues the image's features, as a text that would stand before the prompt. */
    readonly prefix_conditioning: boolean;
    readonly config: PretrainedConfig;
    /** What `generate()` does unless it is told otherwise. */
    readonly generation_config: Record<string, unknown>;
    readonly tokenizer: PreTrainedTokenizer;
    readonly processor: Processor;
    readonly dtype: PerGraph<string>;
    readonly device: PerGraph<string>;

    /**
     * Runs the vision tower on one image, or on its pixel values `[1, 3, height, width] float32`: `[1, patches, hidden]
     * float32`. In layouts captioner and chat the projection is in it. Where a model takes tiles, they are the first
     * dimension.
     */
    encode_image(image: ImageInput | Tensor): Promise<Tensor>;
    /**
     * Takes the tower's output to the decoder's width, `[1, tokens, decoder_hidden] float32`: the same tensor in layouts
     * captioner and chat.
     */
    project_vision_features(features: Tensor): Promise<Tensor>;
    /**
     * Runs the decoder once, on `input_ids` `[batch, tokens] int64`: logits `[batch, 1, vocabulary] float32` of the last,
     * and the cache.
     */
    forward(inputs: {
        /**
         * Without a past the prompt: in layout captioner the start token, in layout chat with an image token for each row
         * of `image_features`, in layout components perhaps none. Several tokens after a past are for a batch of one.
         */
        input_ids: Tensor | number[][];
        /** What `project_vision_features` gave; in layout captioner in every run, else in the one without a past. */
        image_features?: Tensor;
        /** Lines and columns of cells of each image of a prompt, for a model whose images have grids (Qwen-VL). */
        grids?: number[][];
        /** What the last run gave; it is used up. */
        past_key_values?: PastKeyValues;
        /** What the last run gave, for a model whose images have grids. */
        shift?: number;
    }): Promise<{ logits: Tensor; past_key_values: PastKeyValues; shift?: number }>;
    /**
     * Generates texts about an image: greedily, by beam search (`num_beams`) or by sampling (`do_sample`).
     *
     * An option that is not known, not possible or without effect is an error.
     */
    generate(options?: GenerateOptions): Promise<Generated>;
    /** Frees the sessions. Nothing can be run afterwards. */
    dispose(): Promise<void>;
}

/** A prefix-conditioning model; `from_pretrained` refuses any other. */
export class PrefixConditioningVLM extends VisionLanguageModel {
    readonly prefix_conditioning: true;
}
