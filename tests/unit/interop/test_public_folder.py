"""Opening Hugging Face folders: what is listed, what is read, and every way in which a folder is no model."""

import json

import pytest
import torch
from made_up_model import folder_of

from moe_train.errors import DataError
from moe_train.interop.folder import PublicFolder

TENSORS = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(3).bfloat16(), "c": torch.tensor(2.5)}


@pytest.mark.parametrize("files", [1, 2, 3])
def test_tensors_are_listed_and_read_in_pieces(tmp_path, files):
    folder = PublicFolder.open(folder_of(tmp_path, TENSORS, files, {"hidden_size": 6}))
    assert folder.config["hidden_size"] == 6
    assert folder.shapes == {"a": (4, 6), "b": (3,), "c": ()}
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.read(name), tensor) and folder.read(name).dtype == tensor.dtype
    for index in (2, slice(1, 3), slice(0, 4, 2)):
        assert torch.equal(folder.read("a", index), TENSORS["a"][index])


def broken(path, kind):
    """Make a folder with a fault; return the words of its message."""
    folder_of(path, TENSORS, 3)
    second = path / "model-00002-of-00003.safetensors"
    index = path / "model.safetensors.index.json"
    match kind:
        case "no folder":
            return path / "elsewhere", ["is not a folder", "hf download"]
        case "no config":
            (path / "config.json").unlink()
            return path, ["config.json", "No such file"]
        case "no json":
            (path / "config.json").write_text("{")
            return path, ["config.json", "is not JSON"]
        case "no object":
            (path / "config.json").write_text("[]")
            return path, ["config.json", "is not a JSON object"]
        case "pickles":
            index.unlink()
            (path / "pytorch_model.bin").write_bytes(b"")
            return path, ["pickles", "save it as safetensors"]
        case "no weights":
            index.unlink()
            return path, ["neither model.safetensors nor"]
        case "truncated":
            second.write_bytes(second.read_bytes()[:-2])
            return path, [second.name, "damaged or truncated"]
        case "no safetensors":
            second.write_bytes(b"version https://git-lfs")
            return path, [second.name, "damaged or truncated"]
        case "two files missing":
            second.unlink()
            (path / "model-00003-of-00003.safetensors").unlink()
            return path, ["2 problems", second.name, "00003-of", "is missing"]
        case "tensor missing":
            content = json.loads(index.read_text())
            content["weight_map"]["gone"] = second.name
            index.write_text(json.dumps(content))
            return path, [second.name, "lacks gone"]
        case "path outside":
            index.write_text(json.dumps({"weight_map": {"a": "../model-00001-of-00003.safetensors"}}))
            return path, ["has no weight_map"]
        case "gptq":
            (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
            return path, ["quantised as gptq", "use the folder with plain weights"]
    raise AssertionError(kind)


KINDS = ["no folder", "no config", "no json", "no object", "pickles", "no weights", "truncated", "no safetensors",
         "two files missing", "tensor missing", "path outside", "gptq"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_refused_with_place_and_remedy(tmp_path, kind):
    path, words = broken(tmp_path / "model", kind)
    with pytest.raises(DataError) as caught:
        PublicFolder.open(path)
    report = caught.value.report()
    assert all(word in report for word in words), report
    assert str(path) in report
