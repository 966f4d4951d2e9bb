"""Configuration: the schema with every default, the rules across fields, and how Hydra composes it."""
