"""Subject `mask`: the laws of an encoded row."""
