"""The scoreboards: what trainers make of rows and pairs, and servers of prompts and answers.

`scripts/scoreboards.py` is their command. `results` has the shape of a recorded result, whichever program made it, and
`tables` the tables made of it. `trainers`, `layers`, `prepared`, `prompts` and `answers` have one board each: its
files on disk, and how a program is run and judged. `pages` puts the tables into the pages.
"""
