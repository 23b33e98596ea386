"""Kinds 19, 21: tokenizers, rules of generation, templates."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import ASK, GOLDEN, ONNX, RUN, Case, rows
from bad.changes import (
    BINARY,
    DEEP,
    DIGITS,
    EMPTY,
    GONE,
    HALF_JSON,
    LIST,
    NOT_JSON,
    NULL,
    OPENED,
    both,
    cut,
    drop,
    literal,
    put,
    raw,
)


def tokenizers() -> Iterator[Case]:
    tokenizer = (
        EMPTY,
        BINARY,
        OPENED,
        LIST,
        NULL,
        raw("{}"),
        DEEP,
        (put("model", 5), ""),
        (put("model.type", "nope"), ""),
        (put("model.vocab", []), ""),
        (drop("model"), ""),
        (put("added_tokens", "x"), ""),
        cut(500),
        (put("version", 5), ""),
    )
    config = (
        EMPTY,
        BINARY,
        OPENED,
        LIST,
        NULL,
        DEEP,
        DIGITS,
        (put("eos_token", 5), "eos_token"),
        (put("eos_token", {}), "eos_token"),
        (put("eos_token", {"content": 5}), "eos_token"),
        (put("model_max_length", "x"), "model_max_length"),
        (put("bos_token", ["x"]), "bos_token"),
        (put("added_tokens_decoder", "x"), "added_tokens_decoder"),
        (put("added_tokens_decoder", {"x": {}}), "added_tokens_decoder"),
        (put("extra_special_tokens", 5), "extra_special_tokens"),
        (put("padding_side", 5), "padding_side"),
    )
    for command, base in ((GOLDEN, "base"), (ONNX, "work/merged")):
        yield from rows(19, "captioner", command, f"{base}/tokenizer.json", *tokenizer)
        yield from rows(19, "captioner", command, f"{base}/tokenizer_config.json", *config)
    yield from rows(19, "captioner", f"{RUN} --backend onnx", "work/repo/tokenizer.json", *tokenizer, GONE)
    yield from rows(
        19, "captioner", f"{RUN} --backend onnx", "work/repo/tokenizer_config.json", EMPTY, BINARY, OPENED, LIST, DEEP
    )
    rules = (
        (put("eos_token_id", "x"), "eos_token_id"),
        (put("eos_token_id", ["x"]), "eos_token_id"),
        (put("eos_token_id", {}), "eos_token_id"),
        (put("eos_token_id", 1.5), "eos_token_id"),
        (put("max_new_tokens", "x"), "max_new_tokens"),
        (put("max_new_tokens", 1e9), "max_new_tokens"),
        (put("max_new_tokens", -1), "max_new_tokens"),
        (put("max_new_tokens", [5]), "max_new_tokens"),
        (put("repetition_penalty", "x"), "repetition_penalty"),
        (put("repetition_penalty", 0), "repetition_penalty"),
        (put("repetition_penalty", -1.0), "repetition_penalty"),
        (literal("repetition_penalty", "NaN"), ""),
        (put("no_repeat_ngram_size", "x"), "no_repeat_ngram_size"),
        (put("no_repeat_ngram_size", -1), "no_repeat_ngram_size"),
        (put("bad_words_ids", "x"), "bad_words_ids"),
        (put("bad_words_ids", [5]), "bad_words_ids"),
        (put("bad_words_ids", [["x"]]), "bad_words_ids"),
        (put("suppress_tokens", "x"), "suppress_tokens"),
        (put("suppress_tokens", ["x"]), "suppress_tokens"),
        (put("forced_bos_token_id", "x"), "forced_bos_token_id"),
        (put("begin_suppress_tokens", 1.5), "begin_suppress_tokens"),
        (put("min_length", "x"), "min_length"),
        (put("max_length", "x"), "max_length"),
        *NOT_JSON,
    )
    yield from rows(19, "captioner", GOLDEN, "base/generation_config.json", *rules)
    yield from rows(19, "captioner", ONNX, "work/merged/generation_config.json", *rules[:4], *HALF_JSON)
    yield from rows(
        25,
        "captioner",
        f"{RUN} --backend onnx",
        "work/repo/generation_config.json",
        *rules,
        (put("num_beams", 10**6), "num_beams"),
        (put("num_beams", "x"), "num_beams"),
        (put("num_beams", 1.5), "num_beams"),
        (put("top_k", "x"), "top_k"),
        (both(put("do_sample", True), put("top_p", "x")), "top_p"),
        (both(put("do_sample", True), put("temperature", 0)), "temperature"),
        (both(put("do_sample", True), put("temperature", "x")), "temperature"),
        (put("do_sample", "x"), "do_sample"),
        (put("early_stopping", "x"), "early_stopping"),
        (put("num_return_sequences", 10**9), "num_return_sequences"),
        (put("length_penalty", "x"), "length_penalty"),
        (put("pad_token_id", "x"), "pad_token_id"),
        (put("max_new_tokens", 10**23), "max_new_tokens"),
        (put("decoder_start_token_id", None), "decoder_start_token_id"),
        (put("decoder_start_token_id", "x"), "decoder_start_token_id"),
        (put("decoder_start_token_id", -1), "decoder_start_token_id"),
    )
    templates = (
        raw("{{ 1 // 0 }}", "division by 0"),
        raw("{{ 10.0 ** 999 }}", "overflow"),
        raw("{% for a in range(10**9) %}x{% endfor %}", "range"),
        raw("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        raw("{{ '\\ud800' }}", "surrogate"),
        raw("{% if %}", "syntax"),
        raw("{{ messages.x.y.z }}", "undefined"),
        raw("{{ raise_exception('no\nway') }}", "raises"),
        raw("{{ ''.__class__.__mro__ }}", "escape"),
        raw("{{ cycler.__init__.__globals__.os.system('x') }}", "escape 2"),
        raw("{{ 'x' * 3000000000 }}", "3 GB"),
        raw(
            "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3,
            "nested loops",
        ),
        raw("{{ 'x' * 200000000 }}", "200 MB"),
        raw("{{ range(99999) | list * 99999 }}", "long list"),
        raw("{{ 9 ** (9 ** 9) }}", "power"),
        raw("{{ '%0999999999d' % 5 }}", "padding"),
        raw("{{ 'x'.ljust(3000000000) }}", "ljust"),
        raw("{{ 'x' | center(3000000000) }}", "center"),
        raw(
            "{% set x = namespace(v='x') %}{% for i in range(40) %}{% set x.v = x.v + x.v %}{% endfor %}{{ x.v }}",
            "doubling",
        ),
        raw("{{ ('(a+)+$' ~ 'a' * 99) * 99999999 }}", "repeated"),
        raw("{{ 5 | nope }}", "no such filter"),
        raw("{% include 'x' %}", "include"),
        raw("{{ strftime_now(5) }}", "strftime"),
        raw("{{ lipsum(n=9999999) }}", "lipsum"),
        raw("x" * 3_000_000, "3 MB of text"),
    )
    places = (
        raw("<image>" * 3, "places"),
        raw("no place", "no place"),
        raw("{{ messages | batch(0) | list }}", "batch"),
    )
    for command, file, named in (
        (GOLDEN, "base/chat_template.jinja", "golden.prompts"),
        (f"{ASK} --backend onnx", "work/repo/chat_template.jinja", "the prompt"),
    ):
        yield from rows(21, "chat", command, file, BINARY, *((change, "chat template") for change in templates))
        yield from rows(21, "chat", command, file, *((change, "image", named) for change in places))
    yield from rows(
        21,
        "chat",
        f"{ASK} --backend onnx",
        "work/repo/tokenizer_config.json",
        (put("chat_template", 5), "chat_template"),
        (put("chat_template", [5]), "chat_template"),
        (put("chat_template", [{"name": "default"}]), "chat_template"),
        (put("chat_template", {}), "chat_template"),
        (put("bos_token", 5), "bos_token"),
    )
