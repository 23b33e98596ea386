/**
 * What `generate()` is asked for: the caller's options, over the repo's generation_config.json, over transformers'
 * defaults. Nothing is ignored: what is not known or not possible is an error that names it.
 *
 * @typedef {import('../index.d.ts').GenerateOptions} GenerateOptions
 * @typedef {'image' | 'images' | 'pixel_values' | 'prompt' | 'messages' | 'on_token' | 'signal'} Input
 * @typedef {Exclude<keyof GenerateOptions, Input>} Setting Has a row in `TABLE`.
 * @typedef {{ eos_token_ids: number[], max_length?: number, seed?: number }
 *     & Required<Omit<Pick<GenerateOptions, Setting>, 'seed'>>} Plan Every setting, decided.
 */

/** @typedef {{ holds: (value: any) => boolean, what: string }} Rule  Of values that nobody has looked at yet. */

/** @type {(least: number) => Rule} */
const integer = (least) => ({ holds: (x) => Number.isInteger(x) && x >= least, what: `an integer, at least ${least}` });
/** @type {Rule} */
const boolean = { holds: (x) => typeof x === 'boolean', what: 'true or false' };
/** @type {Rule} */
const number = { holds: Number.isFinite, what: 'a number' };
/** @type {Rule} */
const token_id = { holds: (x) => x === null || integer(0).holds(x), what: 'the id of a token' };
/** @type {Rule['holds']} */
const is_ids = (x) => Array.isArray(x) && x.every(integer(0).holds);
/** @type {Rule} */
const token_ids = { holds: (x) => x === null || is_ids(x), what: 'ids of tokens' };
/** @type {Rule} */
const positive = { holds: (x) => Number.isFinite(x) && x > 0, what: 'a number above 0' };

/** @type {Record<Setting, { idle: any } & Rule>} */
const TABLE = {
    max_new_tokens: { idle: 20, ...integer(1) },
    min_new_tokens: { idle: 0, ...integer(0) },
    num_beams: { idle: 1, ...integer(1) },
    num_return_sequences: { idle: 1, ...integer(1) },
    length_penalty: { idle: 1, ...number },
    early_stopping: { idle: false, holds: (x) => [true, false, 'never'].includes(x), what: "true, false or 'never'" },
    do_sample: { idle: false, ...boolean },
    temperature: { idle: 1, ...positive },
    top_k: { idle: 50, ...integer(0) },
    top_p: { idle: 1, holds: (x) => x > 0 && x <= 1, what: 'a number above 0 and up to 1' },
    seed: { idle: undefined, ...integer(0) },
    repetition_penalty: { idle: 1, ...positive },
    no_repeat_ngram_size: { idle: 0, ...integer(0) },
    min_length: { idle: 0, ...integer(0) },
    bad_words_ids: {
        idle: null,
        holds: (x) => x === null || (Array.isArray(x) && x.every((word) => is_ids(word) && word.length > 0)),
        what: 'lists of the ids of tokens',
    },
    suppress_tokens: { idle: null, ...token_ids },
    begin_suppress_tokens: { idle: null, ...token_ids },
    forced_bos_token_id: { idle: null, ...token_id },
    forced_eos_token_id: { idle: null, holds: (x) => token_id.holds(x) || is_ids(x), what: 'ids of tokens' },
};
/** @type {{ do_sample: Setting[], num_beams: Setting[] }} */
const ONLY_WITH = {
    do_sample: ['temperature', 'top_k', 'top_p', 'seed'],
    num_beams: ['length_penalty', 'early_stopping'],
};
/** @type {Input[]} */
const INPUTS = ['image', 'images', 'pixel_values', 'prompt', 'messages', 'on_token', 'signal'];
/** What else a generation_config.json says that changes no token. */
const BOOKKEEPING =
    'bos_token_id eos_token_id pad_token_id decoder_start_token_id max_length transformers_version use_cache ' +
    'cache_implementation cache_config return_dict_in_generate output_attentions output_hidden_states output_scores ' +
    'output_logits low_memory _from_model_config';
const KNOWN = new Set([...Object.keys(TABLE), ...BOOKKEEPING.split(' ')]);

/**
 * @param {string} what is called
 * @param {object} options
 * @param {string[]} known
 */
export function check_keys(what, options, known) {
    const strange = Object.keys(options).find((name) => !known.includes(name));
    if (strange !== undefined) {
        throw new TypeError(`${what} has no option '${strange}'; it has ${known.join(', ')}`);
    }
}

/** @param {GenerateOptions} options */
export function check_generate_options(options) {
    check_keys('generate()', options, [...INPUTS, ...Object.keys(TABLE)]);
    if (options.on_token !== undefined && typeof options.on_token !== 'function') {
        throw new TypeError('on_token: must be a function');
    }
    if (options.image !== undefined && options.images !== undefined) {
        throw new TypeError('images: give image or images, not both');
    }
    if (options.prompt !== undefined && options.messages !== undefined) {
        throw new TypeError('messages: give prompt or messages, not both');
    }
}

/**
 * @param {Record<string, any>} options `GenerateOptions`, whose values nobody has looked at yet
 * @param {Record<string, any>} config generation_config.json
 * @returns {Plan}
 */
export function make_plan(options, config) {
    /** @type {Rule['holds']} */
    const idle = (value) => [null, false, 0, 1].includes(value) || value?.length === 0;
    const strange = Object.keys(config).find((name) => !KNOWN.has(name) && !idle(config[name]));
    if (strange) {
        throw new Error(`generation_config.json: '${strange}' would change what is generated, and is not known here`);
    }
    /** @type {any} */
    const plan = { eos_token_ids: [config.eos_token_id ?? []].flat() };
    /** @type {Record<string, any>} */
    const stored = { ...config, seed: undefined };
    if (!options.max_new_tokens && !stored.max_new_tokens) {
        plan.max_length = stored.max_length;
    }
    for (const [name, { idle, holds, what }] of Object.entries(TABLE)) {
        plan[name] = options[name] ?? stored[name] ?? idle;
        if (plan[name] !== undefined && !holds(plan[name])) {
            throw new TypeError(`${name}: must be ${what}, not ${JSON.stringify(plan[name])}`);
        }
    }
    check_together(plan, options);
    return plan;
}

/**
 * Decides what depends on the prompt: lengths that count it, and whether a token is forced behind a start token alone.
 *
 * @param {Plan} plan that may have a `max_length`, prompt included
 * @param {number} prompt_tokens
 */
export function follow_prompt(plan, prompt_tokens) {
    if (plan.max_length) {
        plan.max_new_tokens = Math.max(1, plan.max_length - prompt_tokens);
    }
    plan.min_new_tokens = Math.max(plan.min_new_tokens, plan.min_length - prompt_tokens);
    if (prompt_tokens !== 1) {
        plan.forced_bos_token_id = null;
    }
}

/** @param {Plan} plan @param {GenerateOptions} options */
function check_together(plan, options) {
    const { num_return_sequences: wanted, num_beams, do_sample } = plan;
    if (plan.min_new_tokens > plan.max_new_tokens) {
        throw new TypeError(
            `min_new_tokens: ${plan.min_new_tokens} is more than max_new_tokens, ${plan.max_new_tokens}`,
        );
    }
    if (wanted > num_beams && (num_beams > 1 || !do_sample)) {
        throw new TypeError(
            `num_return_sequences: ${wanted} takes as many num_beams, not ${num_beams}, or do_sample alone`,
        );
    }
    for (const [needed, names] of Object.entries(ONLY_WITH)) {
        const idle = names.find((name) => options[name] !== undefined && options[name] !== TABLE[name].idle);
        if (idle && !(needed === 'do_sample' ? do_sample : num_beams > 1)) {
            throw new TypeError(`${idle}: does something only with ${needed}`);
        }
    }
}
