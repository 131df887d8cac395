"""Subject `merged`: a merged model's folder, against itself, its base, and the adapter that was merged into it."""
