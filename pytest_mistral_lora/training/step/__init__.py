"""One optimizer step: packed rows, attention, loss, their backward passes on a CPU, and the memory for them."""
