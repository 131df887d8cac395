"""Subject `train`: what training must keep."""
