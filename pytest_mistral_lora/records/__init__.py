"""What a run leaves behind: manifest, decision note, goldens, hashes, files that are whole or absent."""
