"""The checks of the suite, one module a subject; each returns findings and knows nothing of pytest."""
