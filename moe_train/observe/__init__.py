"""What a run tells its user: records to console, file and Weights & Biases, the environment, and the report.

Nothing here imports torch, and matplotlib and wandb are imported where they are used, so that a trainer starts fast.
"""
