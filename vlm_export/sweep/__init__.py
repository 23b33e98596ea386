"""Many recipes, adapters and layouts at once: what is to be done, who does it, and one table of what came of it.

`sweep_file.py` reads the file, `cells.py` makes a recipe for each cell of it, `plan.py` the jobs and what they take;
`stages.py` does one job, `order.py` says which may begin, `in_process.py` and `on_ray.py` have them done; `storage.py`
copies what is finished, `results.py` is what came of it, and `page.py` shows it.
"""
