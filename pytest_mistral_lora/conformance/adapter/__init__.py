"""Subject `adapter`: an adapter folder."""
