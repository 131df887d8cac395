"""Subject `dataset`: a recipe, and every row of its files, or of a file alone."""
