"""Lint a repo for transformers.js, whoever exported it: a rule a file in `rules/`, found by listing them.

`examine.py` runs the rules on a `RepoView`; `classes.py` says what transformers.js loads for each `model_type`. A rule
reads config files and graphs without their weights, and runs nothing.
"""
