"""tasks: `Florence2ForConditionalGeneration` of transformers.js, asked by task prompts about one picture at a time.

It puts the picture's features in front of the prompt's embeddings, runs `encoder_model` on both, and feeds the decoder
embeddings. Its processor finds tasks and their sentences in `preprocessor_config.json`, and leaves the tokens around a
prompt to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from vlm_export.contract import TASK, TASK_ANSWERS, TASKS_ALONE, TASKS_WITH_INPUT
from vlm_export.spec.client import Client, RepoFacts, generation_config


class TaskPrompts(Client):
    """The client of Florence-2.

    `tasks` gives what transformers' processor knows of tasks, by the names of its attributes; `start_token_id` the id
    that every answer begins with, under a config and a stored `generation_config.json`.
    """

    name = "AutoModelForImageTextToText"
    node: Literal["tasks"] = "tasks"
    feeds_one_picture = True
    question = TASK
    padding_side: Literal["right"] = "right"  # positions count from the first feature on, whatever is padding
    surrounds_prompts = True

    def __init__(
        self,
        tasks: Callable[[], Mapping[str, Mapping[str, str]]],
        start_token_id: Callable[[Mapping[str, Any], Mapping[str, Any]], int],
    ):
        self.tasks = tasks
        self.start_token_id = start_token_id

    def config(self, facts: RepoFacts) -> dict[str, dict[str, Any]]:
        """The model's own config, `generation_config.json` with the start token, and a `preprocessor_config.json` with
        the tasks.
        """
        start = self.start_token_id(facts.config, facts.stored_generation)
        tasks = self.tasks()
        with_input = tasks[TASKS_WITH_INPUT]
        return {
            "config.json": {
                **facts.config,
                "is_encoder_decoder": True,
                "text_config": {**facts.text_config, "decoder_start_token_id": start},
            },
            "generation_config.json": generation_config(facts, decoder_start_token_id=start),
            "preprocessor_config.json": {
                **facts.image_processor,
                "processor_class": "Florence2Processor",
                TASKS_ALONE: dict(tasks[TASKS_ALONE]),
                # It takes a task away and leaves the space behind it, which transformers takes away too.
                TASKS_WITH_INPUT: {f"{task} ": sentence for task, sentence in with_input.items()} | dict(with_input),
                TASK_ANSWERS: dict(tasks[TASK_ANSWERS]),
            },
        }

    def javascript(self, repo_id: str, photo: str) -> str:
        """A module's lines that give a picture a task, and parse the answer."""
        return f"""import {{ AutoProcessor, AutoModelForImageTextToText, load_image }} from '@huggingface/transformers';

const photo = '{photo}';
const task = '{self.question}'; // or '<OD>', '<OCR_WITH_REGION>', '<CAPTION_TO_PHRASE_GROUNDING>a cat', …
const processor = await AutoProcessor.from_pretrained('{repo_id}');
const model = await AutoModelForImageTextToText.from_pretrained('{repo_id}');
const image = await load_image(photo);
const output = await model.generate(await processor(image, task));
const [answer] = processor.batch_decode(output, {{ skip_special_tokens: false }});
const parsed = processor.post_process_generation(answer, task, image.size); // labels and boxes, of some tasks
const caption = JSON.stringify(parsed[task]);"""
