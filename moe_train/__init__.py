"""moe_train: train Mixture-of-Experts language models with their experts sharded over ranks."""

__version__ = "0.1.0"
