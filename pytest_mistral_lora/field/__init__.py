"""What other programs do at a version: trainers, evaluators, servers, and the libraries that this package calls."""
