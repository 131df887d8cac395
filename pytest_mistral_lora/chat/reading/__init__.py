"""Read data files: strict JSON Lines, chunks, and a pool of processes. The only I/O of `chat`."""
