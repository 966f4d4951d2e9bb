"""The examples in the docstrings of the public layers, the quick starts of the source documents among them, run."""

import doctest
import importlib
import pkgutil

import pytest

import moe_train
from moe_train import layers

MODULES = [f"{layers.__name__}.{module.name}" for module in pkgutil.iter_modules(layers.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", sorted(moe_train.__all__))
def test_every_public_layer_has_an_example(name: str) -> None:
    (found,) = (test for test in doctest.DocTestFinder().find(getattr(layers, name), name) if test.name == name)
    assert any("import" not in example.source for example in found.examples)
