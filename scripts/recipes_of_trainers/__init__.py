"""Recipes that trainers publish for Mistral's models: recorded as facts from checkouts, and judged offline.

`recordings` reads the files of a checkout and writes docs/recipes/; `trainers` says what the keys of each trainer mean;
`layers` and `rows` judge that with this package; the page is made by `scripts/published_recipes_page.py`.
"""
