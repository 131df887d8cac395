"""Subject `answer`: what the clients of a running server get of answers whose ids are known."""
