"""How gradients are summed over ranks and how a step is executed: the engine."""
