"""The checks of the suite, one room for each subject; checks return findings and know nothing of pytest."""
