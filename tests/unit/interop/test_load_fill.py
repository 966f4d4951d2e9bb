"""Filling a model from a folder: every kind of part, and every way in which the two do not fit."""

from dataclasses import replace

import pytest
import torch
from made_up_model import SHARDED, D, E, F, expected, folder_of, held, public_tensors, whole

from moe_train.errors import CheckpointError, DataError
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import check, fill
from moe_train.interop.parts import Part

NAN = float("nan")


def emptied(experts=range(E), dtype=torch.float32):
    return held({name: torch.full_like(tensor, NAN, dtype=dtype) for name, tensor in whole().items()}, experts)


@pytest.mark.parametrize("experts", [range(0, 4), range(0, 2), range(2, 4), range(3, 4)])
@pytest.mark.parametrize("files", [1, 3])
def test_a_rank_gets_its_experts_and_everything_else(tmp_path, world, experts, files):
    truth = whole()
    folder = PublicFolder.open(folder_of(tmp_path, public_tensors(truth), files))
    found = emptied(experts)
    fill(found, expected(), folder, world)
    for name, tensor in held(truth, experts).tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_a_rank_reads_no_experts_of_others(tmp_path, world, monkeypatch):
    folder = PublicFolder.open(folder_of(tmp_path, public_tensors(whole())))
    read = []
    plain = PublicFolder.read
    monkeypatch.setattr(
        PublicFolder,
        "read",
        lambda self, name, index=slice(None): read.append((name, index)) or plain(self, name, index),
    )
    fill(emptied(range(1, 2)), expected(), folder, world)
    assert {name for name, _ in read if name.startswith("experts.")} == {f"experts.1.w{i}.weight" for i in (1, 2, 3)}
    assert {index for name, index in read if name == "packed"} == {1}
    assert "mtp.embed.weight" not in {name for name, _ in read}, "copies are written, not read"


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_values_take_the_dtype_of_our_tensors(tmp_path, world, stored, wanted):
    public = {name: tensor.to(stored) for name, tensor in public_tensors(whole()).items()}
    found = emptied(dtype=wanted)
    fill(found, expected(), PublicFolder.open(folder_of(tmp_path, public)), world)
    assert found.tensors["norm"].dtype == wanted
    assert torch.equal(found.tensors["norm"], whole()["norm"].to(stored).to(wanted))


def broken(kind):
    """Return public tensors and a table that do not fit, and the words of the message."""
    public, table = public_tensors(whole()), expected()
    match kind:
        case "missing":
            del public["q_proj.weight"], public["experts.3.w2.weight"]
            return public, table, ["2 problems", "lacks q_proj.weight", "lacks experts.3.w2.weight"]
        case "shape":
            public["norm.weight"] = torch.zeros(D + 1)
            return public, table, ["norm.weight has shape [7], not [6]"]
        case "left over":
            public |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
            return public, table, ["holds tensors that the model does not: extra.0", "and 2 more"]
        case "homeless":
            parts = {name: pieces for name, pieces in table.parts.items() if name != "norm"}
            del public["norm.weight"]
            return public, replace(table, parts=parts), ["no place for norm of the model"]
        case "constant":
            public["zeros.bias"] = torch.ones(D)
            return public, table, ["zeros.bias is not 0 everywhere"]
        case "head of an untied model":
            public["lm_head.weight"] = torch.zeros(7, D)
            return public, table, ["lm_head.weight"]
        case "layer":
            public["model.layers.1.extra"] = torch.zeros(1)
            return public, table, ["model.layers.1.extra"]
    raise AssertionError(kind)


KINDS = ["missing", "shape", "left over", "homeless", "constant", "head of an untied model", "layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_listed_and_nothing_is_overwritten(tmp_path, world, kind):
    public, table, words = broken(kind)
    found = emptied()
    with pytest.raises(DataError) as caught:
        fill(found, table, PublicFolder.open(folder_of(tmp_path, public)), world)
    assert all(word in caught.value.report() for word in words), caught.value.report()
    assert all(bool(tensor.isnan().all()) for tensor in found.tensors.values())


def test_a_long_list_is_cut(tmp_path, world):
    with pytest.raises(DataError) as caught:
        parts = {f"ours.{i}": [Part(f"theirs.{i}", (2,))] for i in range(100)}
        table = replace(expected(), parts=expected().parts | parts)
        fill(emptied(), table, PublicFolder.open(folder_of(tmp_path, public_tensors(whole()))), world)
    assert len(caught.value.problems) == 20 and "and 81 more tensors" in str(caught.value)


def test_harmless_tensors_are_passed_over(tmp_path, world):
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "model.layers.2.x": torch.zeros(1),
                "lm_head.weight": torch.zeros(7, D)}  # fmt: skip
    public = public_tensors(whole()) | harmless
    del public["mtp.embed.weight"], public["zeros.bias"]
    folder = PublicFolder.open(folder_of(tmp_path, public, config={"tie_word_embeddings": True}))
    found = emptied()
    fill(found, expected(), folder, world)
    assert torch.equal(found.tensors["embedding"], whole()["embedding"])


def test_fresh_tensors_keep_their_values(tmp_path, world):
    public = public_tensors(whole())
    del public["gate.e_score_correction_bias"]
    table = expected()
    parts = {name: pieces for name, pieces in table.parts.items() if name != "router.bias_E"}
    found = emptied()
    found.tensors["router.bias_E"].fill_(3.0)
    fill(
        found,
        replace(table, parts=parts, fresh={"router.bias_E"}),
        PublicFolder.open(folder_of(tmp_path, public)),
        world,
    )
    assert found.tensors["router.bias_E"].tolist() == [3.0] * E


def test_a_table_that_leaves_a_hole_is_a_fault_of_the_program(tmp_path, world):
    table = expected()
    parts = dict(table.parts) | {"packed": table.parts["packed"][:-1]}
    folder = PublicFolder.open(folder_of(tmp_path, public_tensors(whole())))
    with pytest.raises(RuntimeError, match="parts fill 210 of the 240 values of packed"):
        fill(emptied(), replace(table, parts=parts), folder, world)


@pytest.mark.parametrize("name", sorted(whole()))
def test_a_written_folder_with_one_wrong_value_is_found(tmp_path, world, name):
    truth = whole()
    folder = PublicFolder.open(folder_of(tmp_path, public_tensors(truth)))
    check(held(truth), expected(), folder, world, torch.float32)
    truth[name].view(-1)[-1] *= 1 + 1e-5
    with pytest.raises(CheckpointError, match=f"{name} is not in the files as it is in the model"):
        check(held(truth), expected(), folder, world, torch.float32)
    check(held(truth), expected(), folder, world, torch.bfloat16)


def test_the_sample_has_every_kind_of_part():
    parts = [part for pieces in expected().parts.values() for part in pieces]
    assert any(part.transposed for part in parts) and any(part.rows is not None for part in parts)
    assert any(part.factor != 1 for part in parts) and any(part.copy for part in parts)
    assert {name for name in whole() if name in SHARDED} == SHARDED and F != D
