"""The token at the beginning of a conversation: template or tokenizer writes it, in Python and in JavaScript."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pico_chat
import pytest
from tokenizers import processors

from vlm_export.preprocessing import begun_once
from vlm_export.web.node_runtime import node_home

TALK = [
    {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "a"), ("assistant", "b"))
]
TURNS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'][0]['text'] }}{% endfor %}"
BEGINNINGS = {
    "by its name": ("{{ bos_token }}" + TURNS, "user: aassistant: b"),
    "by its text": ("<s>" + TURNS, "user: aassistant: b"),
    "before each turn": (TURNS.replace("{{", "{{ bos_token + ", 1), "user: a<s>assistant: b"),
    "never": (TURNS, "user: aassistant: b"),
    "where a turn is the system's": (
        "{% if messages[0]['role'] != 'assistant' %}<s>{% endif %}" + TURNS,
        "user: aassistant: b",
    ),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_a_template_leaves_the_beginning_to_the_tokenizer(case: str) -> None:
    template, expected = BEGINNINGS[case]
    tokenizer = pico_chat.tokenizer(["<s>"])
    tokenizer.bos_token = "<s>"
    assert begun_once(template, tokenizer) == template, "this tokenizer adds none"
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    made = begun_once(template, tokenizer)
    assert isinstance(made, str)
    assert (made == template) == (case == "never")
    assert tokenizer.apply_chat_template(TALK, chat_template=made, tokenize=False) == expected
    assert begun_once(made, tokenizer) == made
    assert begun_once([{"name": "default", "template": template}], tokenizer) == [{"name": "default", "template": made}]
    assert in_javascript(made, TALK, bos_token="<s>") == expected
    answer = tokenizer.apply_chat_template(TALK[1:], chat_template=made, tokenize=False)
    assert not str(answer).startswith("<s>") and "assistant: b" in str(answer), "of another first turn"


def in_javascript(template: str, messages: list[dict[str, Any]], **variables: str) -> str:
    """A conversation as the template library of transformers.js writes it."""
    given = json.dumps({"messages": messages, **variables})
    code = f"""
    import {{ Template }} from {json.dumps((node_home() / "node_modules/@huggingface/jinja/dist/index.js").as_uri())};
    process.stdout.write(new Template({json.dumps(template)}).render({given}));
    """
    command = ["node", "--input-type=module", "--eval", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
