"""Reports: findings for files that other programs read."""
