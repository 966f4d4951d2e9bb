"""Processes and what passes between them: the world, the mesh of ranks, and the differentiable collectives."""
