"""Kinds 6, 29: recipes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from bad.case import GOLDEN, MERGE, Case, rows
from bad.changes import BINARY, EMPTY, append, raw, replace


def recipes() -> Iterator[Case]:
    yield from rows(
        6,
        "captioner",
        MERGE,
        "r.yaml",
        (append("adapters: []\n"), "adapters"),
        (append("name: u\n"), "name"),
        (append("'name': u\n"), "name"),
        (append("image_processor: {size: 1, size: 2}\n"), "size"),
    )
    yield from rows(
        29,
        "captioner",
        MERGE,
        "r.yaml",
        EMPTY,
        BINARY,
        (raw("a: ["), "YAML"),
        (raw("- 1"), "mapping"),
        (raw("x"), "mapping"),
        (raw("null"), "mapping"),
        (replace("model: base", 'model: "a\\0b"'), "model"),
        (replace("model: base", "model: ~nobody/x"), "model"),
        (replace("model: base", "model: 5"), "model"),
        (replace("model: base", "model: ''"), "model"),
        (replace("model: base", "model: null"), "model"),
        (replace("model: base", "model: [a]"), "model"),
        (replace("model: base", "model: none/there/at/all"), "model"),
        (replace("name: t", "name: ../t"), "name"),
        (replace("name: t", "name: ''"), "name"),
        (replace("name: t", f"name: {'t' * 300}"), "name"),
        (replace("name: t", 'name: "a\\nb"'), "name"),
        (append("extra: " + "[" * 100_000), "YAML"),
        (append("extra: " + "{a: " * 5_000 + "1" + "}" * 5_000), ""),
        (append("extra: !!bool x\n"), ""),
        (append("extra: !!timestamp x\n"), ""),
        (append("extra: 2024-99-99\n"), ""),
        (append("extra: !!python/object/apply:os.system [ls]\n"), ""),
        (append("extra: !!int x\n"), ""),
        (append("extra: !!float x\n"), ""),
        (append("extra: !!binary x\n"), ""),
        (append("extra: !!set [x]\n"), ""),
        (append("image_processor: &a {x: *a}\n"), "image_processor"),
        (append("image_processor: {x: &a [*a]}\n"), "image_processor"),
        (append(f"image_processor: {{n: {'9' * 5000}}}\n"), ""),
        (
            append(
                "a: &a [x]\n"
                + "".join(f"{one}: &{one} [{','.join([f'*{of}'] * 9)}]\n" for of, one in pairwise("abcdefg"))
                + "image_processor: {x: *g}\n"
            ),
            "",
        ),
        (
            append(
                "image_processor:\n  a: &a {x: 1}\n  b: &b {p: *a, q: *a, r: *a, s: *a, t: *a, u: *a, v: *a, w: *a}\n"
                "  c: &c {p: *b, q: *b, r: *b, s: *b, t: *b, u: *b, v: *b, w: *b}\n"
                "  d: &d {p: *c, q: *c, r: *c, s: *c, t: *c, u: *c, v: *c, w: *c}\n"
                "  e: &e {p: *d, q: *d, r: *d, s: *d, t: *d, u: *d, v: *d, w: *d}\n"
                "  f: &f {p: *e, q: *e, r: *e, s: *e, t: *e, u: *e, v: *e, w: *e}\n"
            ),
            "image_processor",
        ),
        (append("extra: 1\n"), "extra"),
        (append("hubb: {}\n"), "hub"),
        (replace("max_new_tokens: 6", "max_new_tokens: 0"), "max_new_tokens"),
        (replace("max_new_tokens: 6", "max_new_tokens: '6'"), "max_new_tokens"),
        (replace("max_new_tokens: 6", "max_new_tokens: 6.5"), "max_new_tokens"),
        (replace("max_new_tokens: 6", "max_new_token: 6"), "max_new_token"),
        (replace("max_new_tokens: 6", "max_new_tokens: 1000000000"), "max_new_tokens"),
        (replace("max_new_tokens: 6", "repetition_penalty: .nan"), "repetition_penalty"),
        (replace("max_new_tokens: 6", "no_repeat_ngram_size: -1"), "no_repeat_ngram_size"),
        (append("dtypes: [q9]\n"), "dtypes"),
        (append("dtypes: {}\n"), "dtypes"),
        (append("dtypes: q8\n"), "dtypes"),
        (append("layout: none\n"), "layout"),
        (append("base: 5\n"), "base"),
        (append("revision: 5\n"), "revision"),
        (append("trust_remote_code: maybe\n"), "trust_remote_code"),
        (append("trust_remote_code: true\n"), "trust_remote_code"),
        (append("tokenizer: none/there/at\n"), "tokenizer"),
        (append("processor: 5\n"), "processor"),
        (append("chat_template: 5\n"), "chat_template"),
        (append("preprocess: x\n"), "preprocess"),
        (append("model_type: x\n"), "model_type"),
        (append("image_processor: [1]\n"), "image_processor"),
        (replace("path: adapter", "path: adapter\n  x: 1"), "adapters.0.x"),
        (replace("path: adapter", "path: 5"), "adapters.0.path"),
        (replace("path: adapter", "path: nowhere/at/all"), "adapters.0.path"),
        (replace("path: adapter", "path: base"), "base", "adapter_config.json"),
        (append("combination: {type: linear, weights: [.nan]}\n"), "combination.weights"),
        (append("combination: {type: linear, weights: [.inf]}\n"), "combination.weights"),
        (append("combination: {type: linear, weights: []}\n"), "combination.weights"),
        (append("combination: {type: linear, weights: [1, 2]}\n"), "combination.weights"),
        (append("combination: {type: linear, weights: [x]}\n"), "combination.weights"),
        (append("combination: {type: nope, weights: [1]}\n"), "combination.type"),
        (append("combination: {type: svd, weights: [1], svd_rank: 100000000}\n"), "combination.svd_rank"),
        (append("combination: {type: svd, weights: [1], svd_rank: 0}\n"), "combination.svd_rank"),
        (append("combination: {type: ties, weights: [1], density: 5}\n"), "combination.density"),
        (append("combination: {type: linear, weights: [1e308]}\n"), ""),
        (replace("license: apache-2.0", "license: 5"), "hub.license"),
        (replace("license: apache-2.0", "tags: x"), "hub.tags"),
        (replace("license: apache-2.0", "nope: x"), "hub.nope"),
    )
    yield from rows(
        29,
        "captioner",
        GOLDEN,
        "r.yaml",
        (replace("images/*.png", "none/*.png"), "golden.images"),
        (replace("images/*.png", "a\\0b"), ""),
        (replace("- images/*.png", '- "images/\\0.png"'), "golden.images"),
        (replace("- images/*.png", "- images/0.png"), "golden.images"),
        (replace("- images/*.png", "- 5"), "golden.images"),
        (replace("- a cat", "- 2024-01-01"), "golden.prompts"),
        (replace("- a cat", "- 5"), "golden.prompts"),
        (replace("- a cat", "- [{role: user}]"), "golden.prompts"),
        (replace("- a cat", f"- {'word ' * 500}"), ""),
    )
    yield from rows(
        29,
        "chat",
        GOLDEN,
        "r.yaml",
        *(
            (replace(CHAT_YAML, f"  prompts: {text}\n"), "golden.prompts")
            for text in (
                "[]",
                "[[]]",
                "[[{}]]",
                "[[{role: user}]]",
                "[[{role: user, content: 5}]]",
                "[[{role: user, content: []}]]",
                "[[{role: user, content: [{type: image, x: 2024-01-01}]}]]",
                "[&a [*a]]",
                "[what]",
                "[[{role: user, content: [{type: image}, {type: image}]}]]",
                "[[{role: user, content: [{type: text, text: hi}]}]]",
                "[[{role: user, content: [{type: image}, {type: text}]}]]",
                "[[{role: user, content: [{type: video}]}]]",
            )
        ),
    )


CHAT_YAML = """  prompts:
  - - content:
      - type: image
      - text: What?
        type: text
      role: user
"""
