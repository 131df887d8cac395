"""The checks of the suite, one room a subject; each returns findings and knows nothing of pytest."""
