/**
 * What is done to the scores of one row, `[vocabulary] float32`, in transformers' order and in place.
 *
 * Search and greedy choice differ in what scores are: logits where one token is chosen, log-probabilities in a beam.
 *
 * @typedef {import('./options.js').Plan} Plan
 * @typedef {{ key: number, score: number, row: number, id: number }} Candidate
 */

/**
 * @param {Float32Array} scores
 * @param {Readonly<Plan>} plan
 * @param {number[]} history the ids that rules on repetition look back on
 * @param {number} generated how many of them are new
 */
export function process(scores, plan, history, generated) {
    if (plan.repetition_penalty !== 1) {
        penalize_repetition(scores, plan.repetition_penalty, history);
    }
    if (plan.no_repeat_ngram_size > 0) {
        ban_repeated_ngrams(scores, plan.no_repeat_ngram_size, history);
    }
    for (const word of plan.bad_words_ids ?? []) {
        ban_word(scores, word, history, plan.eos_token_ids);
    }
    if (generated < plan.min_new_tokens) {
        ban(scores, plan.eos_token_ids);
    }
    const forces_first = plan.forced_bos_token_id !== null;
    if (generated === 0 && forces_first) {
        force(scores, [plan.forced_bos_token_id]);
    }
    if (generated === plan.max_new_tokens - 1 && plan.forced_eos_token_id !== null) {
        force(scores, [plan.forced_eos_token_id].flat());
    }
    ban(scores, plan.suppress_tokens ?? []);
    if (generated === (forces_first ? 1 : 0)) {
        ban(scores, plan.begin_suppress_tokens ?? []);
    }
    if (plan.do_sample) {
        // Beams need one token more than can end them.
        warp(scores, plan, plan.num_beams > 1 ? plan.eos_token_ids.length + 1 : 1);
    }
}

/** @type {(scores: Float32Array, penalty: number, history: number[]) => void} */
function penalize_repetition(scores, penalty, history) {
    for (const id of new Set(history)) {
        if (id < scores.length) {
            scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
        }
    }
}

/**
 * Bans what would complete a sequence of `size` ids that is there already.
 * @param {Float32Array} scores
 * @param {number} size
 * @param {number[]} history
 */
function ban_repeated_ngrams(scores, size, history) {
    const begun = history.length - size + 1;
    for (let start = 0; start < begun; ++start) {
        let same = 0;
        while (same < size - 1 && history[start + same] === history[begun + same]) {
            ++same;
        }
        if (same === size - 1) {
            ban(scores, [history[start + size - 1]]);
        }
    }
}

/**
 * Bans the last id of a word where the others stand before it; an end alone is no word.
 * @param {Float32Array} scores
 * @param {number[]} word
 * @param {number[]} history
 * @param {number[]} eos_token_ids
 */
function ban_word(scores, word, history, eos_token_ids) {
    const before = word.slice(0, -1);
    const begun = history.length - before.length;
    const stands = begun >= 0 && before.every((id, index) => history[begun + index] === id);
    if (stands && (before.length > 0 || !eos_token_ids.includes(word[0]))) {
        ban(scores, word.slice(-1));
    }
}

/**
 * Leaves nothing but these ids, each as good as the others.
 * @param {Float32Array} scores
 * @param {number[]} ids
 */
function force(scores, ids) {
    scores.fill(-Infinity);
    ids.forEach((id) => (scores[id] = 0));
}

/**
 * Ids without a score, such as image tokens, cannot be generated anyhow.
 * @param {Float32Array} scores
 * @param {number[]} ids
 */
function ban(scores, ids) {
    ids.filter((id) => id < scores.length).forEach((id) => (scores[id] = -Infinity));
}

/**
 * Temperature, then top-k, then top-p; what falls out scores -∞.
 * @param {Float32Array} scores
 * @param {{ temperature: number, top_k: number, top_p: number }} options
 * @param {number} least how many tokens stay in any case
 */
export function warp(scores, { temperature, top_k, top_p }, least) {
    if (temperature !== 1) {
        for (let i = 0; i < scores.length; ++i) {
            scores[i] /= temperature;
        }
    }
    if (top_k > 0 && top_k < scores.length) {
        const best = new Best(Math.max(top_k, least));
        best.offer(scores, 0);
        drop_below(scores, best.worst);
    }
    if (top_p < 1) {
        keep_nucleus(scores, top_p, least);
    }
}

/** @type {(scores: Float32Array, threshold: number) => void} */
function drop_below(scores, threshold) {
    for (let i = 0; i < scores.length; ++i) {
        if (scores[i] < threshold) {
            scores[i] = -Infinity;
        }
    }
}

/**
 * Drops the least probable tokens that together have no more than 1 - `top_p`.
 * @param {Float32Array} scores
 * @param {number} top_p
 * @param {number} least how many tokens stay in any case
 */
function keep_nucleus(scores, top_p, least) {
    /** @type {number[]} */
    const ids = [];
    scores.forEach((score, id) => score > -Infinity && ids.push(id));
    ids.sort((a, b) => scores[a] - scores[b]);
    const most = scores[/** @type {number} */ (ids.at(-1))];
    const weights = ids.map((id) => Math.exp(scores[id] - most));
    const sum = weights.reduce((a, b) => a + b, 0);
    let dropped = 0;
    for (let i = 0; i < ids.length - least; ++i) {
        dropped += weights[i] / sum;
        if (dropped > 1 - top_p) {
            break;
        }
        scores[ids[i]] = -Infinity;
    }
}

/** @param {Float32Array} scores that become log-probabilities */
export function log_softmax(scores) {
    let most = -Infinity;
    for (let i = 0; i < scores.length; ++i) {
        if (scores[i] > most) most = scores[i];
    }
    let sum = 0;
    for (let i = 0; i < scores.length; ++i) {
        sum += Math.exp(scores[i] - most);
    }
    const log_sum = most + Math.log(sum);
    for (let i = 0; i < scores.length; ++i) {
        scores[i] -= log_sum;
    }
}

/** @param {Float32Array} scores */
export function argmax(scores) {
    let best = 0;
    for (let i = 1; i < scores.length; ++i) {
        if (scores[i] > scores[best]) best = i;
    }
    return best;
}

/**
 * @param {Float32Array} scores
 * @param {() => number} random uniform in [0, 1)
 * @returns {number} an id, drawn with the softmax of the scores
 */
export function draw(scores, random) {
    const most = scores[argmax(scores)];
    let sum = 0;
    for (let i = 0; i < scores.length; ++i) {
        if (scores[i] > -Infinity) sum += Math.exp(scores[i] - most);
    }
    let left = random() * sum;
    let drawn = 0;
    for (let i = 0; i < scores.length; ++i) {
        if (scores[i] > -Infinity) {
            drawn = i;
            left -= Math.exp(scores[i] - most);
            if (left < 0) break;
        }
    }
    return drawn;
}

/** The `size` highest of the scores that are offered, best first, the earlier of equal ones before the later. */
export class Best {
    /** @param {number} size */
    constructor(size) {
        this.size = size;
        /** @type {Candidate[]} */
        this.found = [];
    }

    /** The key below which nothing is let in. */
    get worst() {
        return this.found.length < this.size ? -Infinity : this.found[this.found.length - 1].key;
    }

    /**
     * @param {Float32Array} scores
     * @param {number} row that they are of
     * @param {number} [bonus] added to each, in float32
     * @param {(() => number) | null} [random] makes of the choice a drawing without replacement, with the softmax of
     *     the scores: the highest are those of scores with Gumbel noise
     */
    offer(scores, row, bonus = 0, random = null) {
        let worst = this.worst;
        for (let id = 0; id < scores.length; ++id) {
            const score = Math.fround(scores[id] + bonus);
            const key = random ? score - Math.log(-Math.log(random())) : score;
            if (key > worst || this.found.length < this.size) {
                this.insert({ key, score, row, id });
                worst = this.worst;
            }
        }
    }

    /** @param {Candidate} candidate */
    insert(candidate) {
        const { found } = this;
        let place = found.length;
        while (place > 0 && found[place - 1].key < candidate.key) {
            --place;
        }
        found.splice(place, 0, candidate);
        if (found.length > this.size) {
            found.pop();
        }
    }
}
