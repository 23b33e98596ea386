"""Kinds 4, 30, 35: options."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import RUN, Case
from bad.changes import NONE


def options() -> Iterator[Case]:
    def option(kind: int, line: str, named: str, place: str = "captioner") -> Case:
        return Case(kind, place, line, "", NONE, named, "")

    yield option(4, "serve work/repo --port 0 --host=", "--host")
    yield option(4, "serve work/repo --port 0 --host=\0", "--host")
    yield option(4, "serve work/repo --port 0 --host=nope.invalid", "nope.invalid")
    yield option(4, "serve work/repo --port 0 --cors=*", "--cors")
    for values in (
        "--seed -1",
        "--seed 99999999999999999999",
        "--temperature nan",
        "--temperature 1e-320",
        "--temperature inf",
        "--temperature -1",
        "--temperature 0",
        "--top-p nan",
        "--top-p 0",
        "--top-p 2",
        "--top-k -1",
    ):
        name = values.split()[0].removeprefix("--").replace("-", "_")
        yield option(30, f"{RUN} --sample {values}", name)
    for values, name in (
        ("--num-beams 2 --length-penalty 1e308", "length_penalty"),
        ("--num-beams 2 --length-penalty nan", "length_penalty"),
        ("--num-beams 0", "num_beams"),
        ("--num-beams 100000", "num_beams"),
        ("--num-beams 9" + "9" * 30, "num_beams"),
        ("--num-return-sequences 100000 --sample", "num_return_sequences"),
        ("--num-return-sequences -1", "num_return_sequences"),
        ("--max-new-tokens 100000000000000000000000", "max_new_tokens"),
        ("--max-new-tokens 0", "max_new_tokens"),
        ("--max-new-tokens 1000000", "max_new_tokens"),
        ("--min-new-tokens 1000", "min_new_tokens"),
        ("--min-new-tokens -5", "min_new_tokens"),
        ("--repetition-penalty 0", "repetition_penalty"),
        ("--repetition-penalty nan", "repetition_penalty"),
        ("--repetition-penalty 1e300", "repetition_penalty"),
        ("--no-repeat-ngram-size -1", "no_repeat_ngram_size"),
        ("--dtype q9", "q9"),
        ("--dtype q4", "q4"),
    ):
        yield option(35, f"{RUN} {values}", name)
    for threads in ("99999999999", "100000", "-1", "x"):
        yield option(30, f"{RUN} --threads {threads}", "threads")
    for line in (
        "bench r.yaml --work work --new-tokens 0",
        "bench r.yaml --work work --rounds 0",
        "bench r.yaml --work work --rounds 1000000000",
    ):
        yield option(35, line, line.split()[-2])
    yield option(35, "bench r.yaml --work work --new-tokens 1000000", "max_new_tokens")
    yield option(30, "merge r.yaml --work a\0b", "zero character")
    yield option(30, "onnx r.yaml --work work --memory nan", "--memory")
    yield option(30, "onnx r.yaml --work work --memory -1GB", "--memory")
    yield option(30, "onnx r.yaml --work work --quantize auto --budget 1e400GB", "--budget")
    yield option(30, "onnx r.yaml --work work --quantize auto --max-kl nan", "--max-kl")
    yield option(30, "onnx r.yaml --work work --quantize auto --max-kl inf", "--max-kl")
    yield option(30, "onnx r.yaml --work work --quantize qqq", "qqq")
    yield option(30, "run \0 images/0.png", "")
    yield option(30, "run work/repo a\0b.png", "")
    yield option(30, "inspect a\0b", "")
    yield option(30, "doctor a\0b", "")
    yield option(30, "push a\0b --recipe r.yaml --work work --dry-run", "")
