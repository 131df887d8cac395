"""A GPU tried with this trainer: tiny runs beside the same runs on the CPU, and steps of a large model's shape.

`trials` names and judges the runs, `child` trains one of them in a process of its own, `reference` has the recorded
runs of a CPU, `shape` measures steps of a model with the layers of a 7B base, and `report` writes what was found.
"""
