"""Mixture of agents (arXiv 2406.04692): models that answer a request in layers, each layer reading the one below.

Nothing is trained and no weights are mixed: what passes between layers is text. Shapes here have letters of their own
beside the project's legend: ``P`` proposers, ``N`` texts, ``C`` classes.
"""
