"""Subject `encoded`: rows as a trainer encoded them."""
