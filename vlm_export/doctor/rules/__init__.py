"""The rules, one a file: each module has a docstring that names its section of transformers.js's contract, and `check`.

`check(repo)` yields what it finds. A new rule is a new file here, and a repo that breaks it in `tests/test_doctor.py`.
"""
