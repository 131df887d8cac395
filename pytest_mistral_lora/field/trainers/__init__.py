"""The trainers and harnesses of this package."""
