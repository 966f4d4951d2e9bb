"""One file per suite: what it builds and what its table says."""
