"""The families, one a file, named after its `model_type` and found by that name; `_` begins what several share."""
