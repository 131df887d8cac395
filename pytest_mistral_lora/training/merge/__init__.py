"""Add an adapter to its base's weights: planned, streamed tensor by tensor, and proven before the folder is there."""
