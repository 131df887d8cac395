"""One optimizer step: exact, and nothing computed in vain; what it needs of memory."""
