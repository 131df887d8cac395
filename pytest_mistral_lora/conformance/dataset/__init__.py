"""Subject `dataset`: a recipe and every row of its files, or the rows of a single file."""
