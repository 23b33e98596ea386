"""The one door for the JSON of a model, an adapter or an exported repo: what each file may hold, checked as it is read.

`reading.py` reads; a module for each file says what its keys are. A key that is not in its form is left as it is: these
files are other programs'. What our own commands write for each other is read by `documents.py`.
"""
