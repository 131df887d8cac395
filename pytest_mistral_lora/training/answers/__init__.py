"""What a model says: watched in training, recorded, and judged afterwards."""
