"""Subject `manifest`: the manifest of an adapter folder."""
