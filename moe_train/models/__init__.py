"""The transformer, its blocks, its initial values, and its parameter and FLOP counts from config alone."""
