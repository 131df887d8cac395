"""Reports: the checks of a session, and the comparison of two runs, for terminals, pages and other programs."""
