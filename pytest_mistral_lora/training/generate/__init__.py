"""Generate answers, record them as golden transcripts, and judge a model by recorded ones."""
