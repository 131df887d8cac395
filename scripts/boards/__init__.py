"""The scoreboards: what trainers make of rows and pairs, and servers of prompts and answers.

`scripts/scoreboards.py` is their command. `results` has the shape of a result, whichever program it is of, and `tables`
makes the tables of results. `trainers`, `prompts` and `answers` read what is recorded as results; `trainer_runs` runs
the trainers, and the other two ask servers. `layers` and `prepared` are not about right or wrong cases, and have tables
of their own. `pages` puts the tables into the pages, and `in_trainer` runs in the environment of a trainer.
"""
