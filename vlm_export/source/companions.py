"""The files beside the weights: tokenizer, chat template, processor, generation rules; and whose are taken.

A fine-tune saves its own beside its adapter, as `processor.save_pretrained` and every trainer do: tokens were added,
the template was changed, images have another size. Those of the last adapter that has them win over the model's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vlm_export.atomic import scratch_folder
from vlm_export.errors import InputError
from vlm_export.files import write_json
from vlm_export.forms.reading import json_of
from vlm_export.own_files import own_file
from vlm_export.preprocessing import load_tokenizer
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.tensors.weight_files import folder_of

CONFIG, GENERATION_FILE = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE, PROCESSOR, GENERATION = "tokenizer", "chat template", "processor", "generation rules"
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
FILES: Mapping[str, tuple[str, ...]] = {
    TOKENIZER: (
        *VOCABULARIES,
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    TEMPLATE: ("chat_template.jinja", "chat_template.json"),
    PROCESSOR: ("preprocessor_config.json", "processor_config.json"),
    GENERATION: (GENERATION_FILE,),
}
_TOKENIZER_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template"


@dataclass(frozen=True)
class Choice:
    """What a recipe says of them: the folder of each kind, and the text of a chat template; the rest is found."""

    folders: Mapping[str, Path] = field(default_factory=dict)
    template: str | None = None


@dataclass(frozen=True)
class Companions:
    """The files that were chosen.

    Attributes:
        folder: all of them, and the model's `config.json`: the model's own folder, or one made for them.
        origins: by kind, the folder that they come from.
        files: where each lies.
        chosen: what was chosen where there was a choice, as one sentence, or nothing.
    """

    folder: Path
    origins: Mapping[str, Path]
    files: tuple[Path, ...]
    chosen: str


@contextmanager
def gathered(model: Path, adapters: Sequence[Path] = (), choice: Choice | None = None) -> Iterator[Companions]:
    """The companions of a model with its adapters, in one folder that lasts as long as the context.

    Raises:
        InputError: a link leads out of a folder, or a file is no JSON.
    """
    choice = choice or Choice()
    own = folder_of(model)
    folders = [own, *map(folder_of, adapters)]
    wanted = choice.folders
    origins = {
        kind: wanted.get(kind) or next((folder for folder in reversed(folders) if _has(folder, kind)), own)
        for kind in FILES
    }
    if TOKENIZER in wanted and _has(wanted[TOKENIZER], TEMPLATE):
        origins[TEMPLATE] = wanted[TOKENIZER]
    files = tuple(path for kind, folder in origins.items() for path in _files(folder, kind))
    chosen = _sentence({kind: folder for kind, folder in origins.items() if _has(own, kind)}, own)
    if set(origins.values()) == {own} and choice.template is None:
        yield Companions(own, origins, files, chosen)
        return
    with scratch_folder() as scratch:
        folder = Path(scratch)
        for path in [*files, *filter(None, [own_file(own, CONFIG)])]:
            shutil.copyfile(path, folder / path.name)
        _write_template(folder, origins, choice.template)
        try:
            yield Companions(folder, origins, files, chosen)
        except InputError as error:
            message = str(error)
            if choice.template is not None:
                message = message.replace(str(folder / FILES[TEMPLATE][0]), "the recipe")
            raise InputError(_of_origin(message, folder, [*files, own / CONFIG], origins[TOKENIZER])) from error


def _has(folder: Path, kind: str) -> bool:
    if kind == TOKENIZER:
        return any(own_file(folder, name) for name in VOCABULARIES)
    return bool(_files(folder, kind)) or (kind == TEMPLATE and _in_tokenizer(folder) is not None)


def _files(folder: Path, kind: str) -> list[Path]:
    return [path for name in FILES[kind] if (path := own_file(folder, name))]


def _in_tokenizer(folder: Path) -> object:
    """The template that a tokenizer's config holds, as it was kept before it had a file of its own."""
    return (json_of(folder, _TOKENIZER_CONFIG) or {}).get(_TEMPLATE)


def _write_template(folder: Path, origins: Mapping[str, Path], text: str | None) -> None:
    """Leave one template in the folder: the recipe's, or the one of its origin."""
    held = _in_tokenizer(origins[TEMPLATE])
    if (settings := json_of(folder, _TOKENIZER_CONFIG)) and _TEMPLATE in settings:
        write_json(folder / _TOKENIZER_CONFIG, {key: value for key, value in settings.items() if key != _TEMPLATE})
    if text is not None:
        for name in FILES[TEMPLATE]:
            (folder / name).unlink(missing_ok=True)
        (folder / FILES[TEMPLATE][0]).write_text(text, encoding="utf-8")
    elif held is not None and not _files(folder, TEMPLATE):
        (folder / FILES[TEMPLATE][1]).write_text(json.dumps({_TEMPLATE: held}), encoding="utf-8")


def _sentence(origins: Mapping[str, Path], own: Path) -> str:
    """Of those that the model has too: which ones are not its own."""
    others: dict[Path, list[str]] = {}
    for kind, folder in origins.items():
        if folder != own:
            others.setdefault(folder, []).append(kind)
    return "; ".join(
        f"{', '.join(kinds)}: of {folder}, not of the model (`tokenizer: model` and `processor: model` in the recipe "
        "take the model's)"
        for folder, kinds in others.items()
    )


def _of_origin(message: str, scratch: Path, files: Sequence[Path], folder: Path) -> str:
    """A message about gathered files that names those which they were copied from."""
    for path in files:
        message = message.replace(str(scratch / path.name), str(path))
    return message.replace(str(scratch), str(folder))


def check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises InputError where a folder's tokenizer is that of another model than the checkpoint.

    Tokens that were added to it and have no row in the model's table do no harm as long as nothing feeds them: a
    padding token is added so, and batches are not padded here.
    """
    tokenizer = load_tokenizer(folder)
    rows = checkpoint.family.text_config(checkpoint.config).vocab_size
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    foreign = [token for token, index in tokenizer.get_vocab().items() if index >= rows and token not in added]
    if foreign:
        raise InputError(
            f"{folder / 'tokenizer.json'}: {len(tokenizer)} tokens, and text_config.vocab_size is {rows}: "
            f"this tokenizer belongs to another model ({min(foreign)!r})"
        )
