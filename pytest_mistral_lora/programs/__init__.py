"""How this package finds what it knows of other programs: trainers, servers and dated facts, ours and a stranger's."""
