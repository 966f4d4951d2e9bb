"""`import moe_train` is quick: its layers, and torch with them, are imported when they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import moe_train

LAYERS = ["DeepSeekMoE", "ExpertGraphConv", "ExpertRouter", "GraphCoupledMoE", "MoELayer", "SwitchFFN"]


def python(code: str) -> str:
    root = Path(moe_train.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_imports_no_torch() -> None:
    assert python("import sys, moe_train; print(moe_train.__version__, 'torch' in sys.modules)").endswith(" False")


def test_asking_for_a_layer_imports_it() -> None:
    names = ", ".join(LAYERS)
    assert python(f"import sys; from moe_train import {names}; print('torch' in sys.modules)") == "True"


def test_the_layers_are_named_before_they_are_imported() -> None:
    assert set(LAYERS) <= set(python("import moe_train; print(*dir(moe_train))").split())
    assert sorted(moe_train.__all__) == LAYERS


def test_an_unknown_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nope'"):
        _ = moe_train.Nope
