"""Train the projection and the LoRA of real-captioner. Tower and decoder stay as their packages have them.

    python recipes/real-captioner/train.py features   # 1. what the tower sees of each training scene
    python recipes/real-captioner/train.py words      # 2. the projection alone: a patch is given its noun's embedding
    python recipes/real-captioner/train.py captions   # 3. projection and LoRA on captions, through the decoder
    python recipes/real-captioner/train.py save       # writes trained.safetensors and training.json beside this file
    python recipes/real-captioner/train.py evaluate   # captions of held-out scenes that are exactly right

Each step follows from its seed; its state lies in the user's cache, where the first and the third go on when they were
stopped. The second takes minutes and begins anew. It is what makes the third short: nothing goes through the decoder,
and what is left to learn there is which words it is given, and how to put them in order.

The sequence is that of distilvit2: the patches, the caption, the end token. No prompt; the last patch predicts the
caption's first token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import scenes
import torch
from assemble import LORA_ALPHA, LORA_RANK, LORA_TARGETS, MAX_NEW_TOKENS, MLP_HIDDEN, PREPROCESSOR, TRAINED
from language_model import LanguageModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scenes import SIDE, Scene
from torch import Tensor, nn
from torch.nn import functional
from tower import IMAGE_SIZE, PATCH_SIZE, Tower
from transformers import (
    AutoModelForCausalLM,
    BitImageProcessorPil,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from vlm_export.files import cache_folder
from vlm_export.models.prefix import ProjectionHead, nested_config

SEED = 1
SCENES = 20_000
CHUNK = 200  # scenes between two saves of the features
BATCH = 16
WORD_EPOCHS, WORD_BATCH, WORD_RATE = 12, 512, 2e-3
CORE = 0.15  # of a thing's side: its border, whose patches are given no word
TEMPERATURE = 0.05
LORA_RATE, PROJECTION_RATE = 1e-3, 3e-4
DEVELOPMENT = 10_000  # the first seed of the held-out scenes that training looks at; evaluation's begin at 0
LOG = Path(__file__).parent / "training.json"


@dataclass(frozen=True)
class Batch:
    """`features [batch, patches, width]`, `ids [batch, tokens]`, and labels of the ids and of the end, -100 behind."""

    features: Tensor
    ids: Tensor
    labels: Tensor


class Captioner(nn.Module):
    """Projection and decoder with its LoRA; what the tower gives is its input."""

    def __init__(self, language_model: LanguageModel, tower: Tower):
        super().__init__()
        torch.manual_seed(SEED)
        config = nested_config(language_model.config())
        self.projection = ProjectionHead(tower.config["hidden_size"], config.hidden_size, "mlp", MLP_HIDDEN)
        decoder = AutoModelForCausalLM.from_config(config)
        weights = {name: torch.from_numpy(np.array(language_model.load(name))) for name in language_model.shapes}
        decoder.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
        lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
        self.language_model = get_peft_model(decoder, lora)

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of captions and end tokens."""
        decoder: Any = self.language_model.base_model.model
        prefix = self.projection(batch.features)
        embeds = torch.cat([prefix, decoder.model.embed_tokens(batch.ids)], dim=1)
        hidden = decoder.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = decoder.lm_head(hidden[:, prefix.shape[1] - 1 :])
        return functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)

    @torch.inference_mode()
    def captions(self, features: Tensor, tokenizer: PreTrainedTokenizerFast, beams: int = 1) -> list[str]:
        """Of `[images, patches, width]`, greedy unless there are beams."""
        self.eval()
        said: list[str] = []
        for part in features.float().split(50):
            prefix = self.projection(part)
            tokens = self.language_model.generate(
                inputs_embeds=prefix,
                attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long),
                do_sample=False,
                num_beams=beams,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.eos_token_id,
            )
            said += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return said

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by the names that the checkpoint has."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Take trained values, as `trained` names them.

        Raises:
            ValueError: some are missing, or are none of the model's.
        """
        own = self.trained()
        if own.keys() != tensors.keys():
            raise ValueError(f"other tensors than those that are trained: {sorted(own.keys() ^ tensors.keys())[:3]}")
        for name, value in own.items():
            value.copy_(tensors[name])


# --- 1. features


def features_of(chosen: Sequence[Scene]) -> Tensor:
    """`[scenes, patches, width] float32`: what the tower gives for the scenes' pictures."""
    processor, model = BitImageProcessorPil(**PREPROCESSOR), _tower()
    with torch.inference_mode():
        parts = []
        for start in range(0, len(chosen), 32):
            pictures = [scenes.draw(scene) for scene in chosen[start : start + 32]]
            parts.append(model(processor(pictures, return_tensors="pt")["pixel_values"]).last_hidden_state)
    return torch.cat(parts)


def write_features(folder: Path, count: int) -> None:
    """`features.npy`, float16, of the first `count` training scenes; goes on behind those that it has."""
    path, progress = folder / "features.npy", folder / "features.json"
    done = json.loads(progress.read_text()) if progress.is_file() else 0
    while done < count:
        part = features_of([scenes.trained_scene(seed) for seed in range(done, min(done + CHUNK, count))])
        shape = (count, *part.shape[1:])
        stored = np.lib.format.open_memmap(path, "r+" if path.is_file() else "w+", np.float16, shape)
        stored[done : done + len(part)] = part.numpy()
        stored.flush()
        done += len(part)
        progress.write_text(json.dumps(done))
        click.echo(f"features of {done} of {count} scenes")


@cache
def _tower() -> nn.Module:
    return Tower().module()


# --- 2. words


def patch_words(scene: Scene, words: dict[str, int]) -> np.ndarray:
    """`[patches]`: the word that each patch shows, of a thing or of the ground; -1 where it shows parts of both."""
    patch = PATCH_SIZE * SIDE / IMAGE_SIZE
    grid = round(SIDE / patch)
    centres = (np.arange(grid) + 0.5) * patch
    across, down = np.meshgrid(centres, centres)
    found = np.full((grid, grid), words[ground_word(scene.ground)])
    for thing in scene.things:
        for border, word in ((-0.5 * patch, -1), (CORE * thing.side, words[noun_word(thing.noun)])):
            inside = [
                (start + border < centre) & (centre < start + thing.side - border)
                for start, centre in ((thing.left, across), (thing.top, down))
            ]
            found[inside[0] & inside[1]] = word
    return np.concatenate([[-1], found.flatten()])


def noun_word(noun: str) -> str:
    """A noun without its article."""
    return noun.removeprefix("a ").removeprefix("an ")


def ground_word(ground: str) -> str:
    """The colour, or the photograph's noun: "a field of grass"."""
    return noun_word(ground.removeprefix("in front of ").removeprefix("on "))


def all_words() -> dict[str, int]:
    grounds = [*scenes.COLOURS, *scenes.PHOTOGRAPHS]
    named = [*map(noun_word, scenes.codes()), *map(ground_word, grounds)]
    return {word: index for index, word in enumerate(dict.fromkeys(named))}


def train_words(model: Captioner, features: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Any]]:
    """Give each patch a vector near the mean embedding of its word's tokens, and as long as embeddings are."""
    words = all_words()
    labels = torch.from_numpy(
        np.stack([patch_words(scenes.trained_scene(seed), words) for seed in range(len(features))])
    )
    table = model.language_model.get_input_embeddings().weight.detach()
    means = torch.stack([table[tokenizer(f" {word}")["input_ids"]].mean(0) for word in words])
    targets, length = functional.normalize(means, dim=-1), table.norm(dim=-1).mean()
    things = (labels >= 0) & (labels < len(scenes.codes()))
    ground = (labels >= len(scenes.codes())) & (torch.rand(labels.shape) < 0.25)
    rows, columns = torch.nonzero(things | ground, as_tuple=True)
    inputs, classes = torch.from_numpy(features[rows.numpy(), columns.numpy()]), labels[rows, columns]
    steps = WORD_EPOCHS * (len(inputs) // WORD_BATCH)
    optimizer = torch.optim.AdamW(model.projection.parameters(), lr=WORD_RATE, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.projection.train()
    generator = torch.Generator().manual_seed(SEED)
    for epoch in range(1, WORD_EPOCHS + 1):
        order, losses = torch.randperm(len(inputs), generator=generator), []
        for chosen in order[: len(order) // WORD_BATCH * WORD_BATCH].split(WORD_BATCH):
            given = model.projection(inputs[chosen].float())
            near = functional.cross_entropy(
                functional.normalize(given, dim=-1) @ targets.T / TEMPERATURE, classes[chosen]
            )
            long = (given.norm(dim=-1) / length).log().square().mean()
            (near + long).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(near.item())
        yield {"epoch": epoch, "loss": float(np.mean(losses))}


# --- 3. captions


def batches(features: np.ndarray, tokenizer: PreTrainedTokenizerFast, first_step: int) -> Iterator[Batch]:
    """Batches of `BATCH` scenes from that step on, shuffled anew in each pass."""
    a_pass = len(features) // BATCH
    step = first_step
    while True:
        order = np.random.default_rng((SEED, step // a_pass)).permutation(len(features))
        for index in range(step % a_pass, a_pass):
            chosen = np.sort(order[index * BATCH : (index + 1) * BATCH])
            captions = [scenes.trained_scene(int(seed)).caption for seed in chosen]
            yield Batch(torch.from_numpy(features[chosen]).float(), *encode(captions, tokenizer))
            step += 1


def encode(captions: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids, and the labels of the positions that predict them and the end."""
    rows = tokenizer(captions)["input_ids"]
    width, end = max(map(len, rows)), tokenizer.eos_token_id
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    labels = torch.tensor([[*row, end] + [-100] * (width - len(row)) for row in rows])
    return ids, labels


def optimizer_of(model: Captioner, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    groups = [
        {"params": list(model.projection.parameters()), "lr": PROJECTION_RATE},
        {"params": [p for p in model.language_model.parameters() if p.requires_grad], "lr": LORA_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 25, steps)


def exact(said: Sequence[str], chosen: Sequence[Scene]) -> float:
    """The share of captions that are right, letter for letter."""
    return sum(text == scene.caption for text, scene in zip(said, chosen, strict=True)) / len(chosen)


def train_captions(
    model: Captioner, features: np.ndarray, tokenizer: PreTrainedTokenizerFast, steps: int, state: Path
) -> Iterator[dict[str, Any]]:
    """Train to `steps`, from the last saved state on; one entry of the log for each 50 steps."""
    optimizer, schedule = optimizer_of(model, steps)
    done = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_trained(saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["step"]
    watched = [scenes.held_out_scene(DEVELOPMENT + seed) for seed in range(50)]
    seen = features_of(watched)
    weights, losses, start = list(model.trained().values()), [], time.perf_counter()
    for step, batch in zip(range(done + 1, steps + 1), batches(features, tokenizer, done), strict=False):
        model.train()
        loss = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 and step != steps:
            continue
        entry = {"step": step, "samples": step * BATCH, "loss": float(np.mean(losses))}
        if not step % 100 or step == steps:
            entry["exact"] = exact(model.captions(seen, tokenizer), watched)
        saved = {"trained": model.trained(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(saved | {"step": step}, state.with_suffix(".part"))
        state.with_suffix(".part").replace(state)
        yield entry | {"seconds": round(time.perf_counter() - start)}
        losses, start = [], time.perf_counter()


# --- commands


@click.group(help=__doc__)
@click.option("--scenes", "count", default=SCENES, show_default=True, help="Scenes to train on.")
@click.option("--state", type=click.Path(path_type=Path), help="Folder of what is kept between steps.")
@click.pass_context
def main(context: click.Context, count: int, state: Path | None) -> None:
    torch.set_num_threads(2)
    folder = state or cache_folder() / "real-captioner" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    context.obj = (folder, count)


@main.command()
@click.pass_obj
def features(training: tuple[Path, int]) -> None:
    """What the tower sees of each training scene."""
    write_features(*training)


@main.command()
@click.pass_obj
def words(training: tuple[Path, int]) -> None:
    """Train the projection alone."""
    folder, count = training
    language_model = LanguageModel()
    model = Captioner(language_model, Tower())
    log = []
    for entry in train_words(model, _features(folder, count), language_model.tokenizer()):
        log.append(entry)
        click.echo(json.dumps(entry))
    save_file(model.trained(), folder / "words.safetensors")
    (folder / "words.json").write_text(json.dumps(log))


@main.command()
@click.option("--steps", default=900, show_default=True, help=f"Steps of {BATCH} scenes.")
@click.pass_obj
def captions(training: tuple[Path, int], steps: int) -> None:
    """Train projection and LoRA through the decoder."""
    folder, count = training
    language_model = LanguageModel()
    model = Captioner(language_model, Tower())
    model.load_trained(load_file(folder / "words.safetensors"))
    tokenizer = language_model.tokenizer()
    with (folder / "captions.jsonl").open("a") as log:
        for entry in train_captions(model, _features(folder, count), tokenizer, steps, folder / "captions.pt"):
            click.echo(json.dumps(entry))
            log.write(json.dumps(entry) + "\n")
            log.flush()


@main.command()
@click.pass_obj
def save(training: tuple[Path, int]) -> None:
    """Write what was trained, in float16, and the log of the training."""
    folder, _ = training
    trained = torch.load(folder / "captions.pt", weights_only=True)["trained"]
    save_file({name: value.half().contiguous() for name, value in trained.items()}, TRAINED)
    entries = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    log = {"words": json.loads((folder / "words.json").read_text()), "captions": entries}
    LOG.write_text(json.dumps(log, indent=1) + "\n")


@main.command()
@click.option("--count", default=300, show_default=True, help="Held-out scenes.")
@click.option("--beams", default=1, show_default=True)
def evaluate(count: int, beams: int) -> None:
    """Print the share of held-out captions that are exactly right, with the adapter and without it."""
    language_model = LanguageModel()
    model, tokenizer = Captioner(language_model, Tower()), language_model.tokenizer()
    model.load_trained({name: value.float() for name, value in load_file(TRAINED).items()})
    for kind, scene in (("new combinations", scenes.held_out_scene), ("in a new style", scenes.new_style_scene)):
        chosen = [scene(seed) for seed in range(count)]
        seen = features_of(chosen)
        click.echo(f"{kind}: {exact(model.captions(seen, tokenizer, beams), chosen):.1%} of {count} captions exact")
        with model.language_model.disable_adapter():
            said = model.captions(seen, tokenizer, beams)
        click.echo(f"{kind}, without the adapter: {exact(said, chosen):.1%}, such as {said[:2]}")


def _features(folder: Path, count: int) -> np.ndarray:
    path = folder / "features.npy"
    if not path.is_file() or json.loads((folder / "features.json").read_text()) < count:
        raise click.ClickException(f"{path}: has no {count} scenes; run the step `features` first")
    return np.load(path, mmap_mode="r")[:count]


if __name__ == "__main__":
    main()
