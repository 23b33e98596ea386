"""The table of bad input: what is spoiled, for which command, and what the one line that it gets must say.

A row is a kind (its number in `kinds.md`), a place (`place.py`), a command that is run there, a file, what is done to
it (`changes.py`), and words that the message holds beside the file's name. A module for each group of kinds has them.
"""

from __future__ import annotations

from bad import adapters, chats, configs, documents, no_files, options, processors, recipes, single, sweeps, tokenizers

GROUPS = (
    no_files.no_files,
    options.options,
    recipes.recipes,
    processors.processors,
    configs.configs,
    tokenizers.tokenizers,
    documents.documents,
    adapters.adapters,
    chats.chats,
    sweeps.sweeps,
    single.single,
)
CASES = [case for group in GROUPS for case in group()]
