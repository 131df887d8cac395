"""Subject `dataset`: every row of a recipe's files."""
