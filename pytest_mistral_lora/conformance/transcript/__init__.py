"""Subject `transcript`: does an adapter answer as its golden transcripts say?"""
