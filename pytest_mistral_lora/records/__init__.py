"""The records of a run: manifest, decision note, goldens, hashes, files that are whole or absent."""
