"""Subject `encoded`: rows that any trainer encoded, against mistral-common."""
