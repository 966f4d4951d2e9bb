"""Pure tensor functions, each with a slow obvious reference beside the fast path."""
