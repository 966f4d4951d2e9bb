"""Weights published in 8 and 4 bits are read as plain tensors, whole and in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_model import folder_of
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_train.errors import DataError
from moe_train.interop.folder import PublicFolder
from moe_train.interop.quantised import dequantise_fp8, dequantise_mxfp4

FEW = settings(max_examples=25, deadline=None)


def fp8_by_loops(values, scales, block):
    plain = torch.empty(values.shape)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            plain[i, j] = float(values[i, j]) * float(scales[i // block[0], j // block[1]])
    return plain


@FEW
@given(st.data())
def test_fp8_blocks_are_scaled_as_by_a_loop(data):
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    block = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    values = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=draw)
    mine = scales[first // block[0] : -(-last // block[0])]
    found = dequantise_fp8(values[first:last], mine, block, first)
    assert torch.equal(found, fp8_by_loops(values, scales, block)[first:last])


@FEW
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_mxfp4_is_what_transformers_makes_of_it(experts, rows, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 150, (experts, rows, groups), generator=draw, dtype=torch.uint8)
    truth = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantise_mxfp4(blocks, scales).transpose(-1, -2), truth)


def test_a_folder_in_mxfp4_looks_like_a_plain_one(tmp_path):
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 4, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(120, 130, (3, 4, 2), generator=draw, dtype=torch.uint8)
    tensors = {"x.down_proj_blocks": blocks, "x.down_proj_scales": scales, "x.down_proj_bias": torch.zeros(3, 4)}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    folder = PublicFolder.open(folder_of(tmp_path, tensors, 2, config))
    truth = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert folder.shapes == {"x.down_proj": (3, 64, 4), "x.down_proj_bias": (3, 4)}
    assert torch.equal(folder.read("x.down_proj"), truth)
    assert torch.equal(folder.read("x.down_proj", 1), truth[1])
    assert torch.equal(folder.read("x.down_proj", slice(1, 3)), truth[1:])


def test_a_folder_in_fp8_looks_like_a_plain_one(tmp_path):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(300, 200, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=draw)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = {"w": values, "w_scale_inv": scales, "norm": torch.ones(3).bfloat16()}
    folder = PublicFolder.open(folder_of(tmp_path, tensors, 1, config))
    truth = fp8_by_loops(values, scales, (128, 128))
    assert folder.shapes == {"w": (300, 200), "norm": (3,)}
    assert torch.equal(folder.read("w"), truth)
    assert torch.equal(folder.read("w", slice(100, 290)), truth[100:290])
    assert torch.equal(folder.read("w", 299), truth[299])


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"w": torch.zeros(8, 8).to(torch.float8_e4m3fn)}, "w is in e4m3 without scales w_scale_inv"),
        ({"w": torch.zeros(8, 8).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 1)}, "for blocks of 128 x 128"),
        ({"w": torch.zeros(8, 8, dtype=torch.uint8)}, "w is in the number format U8"),
        ({"w_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8)}, "has no scales of shape [2, 3, 4]"),
        ({"w_blocks": torch.zeros(2, 3, 4, 8, dtype=torch.uint8)}, "has shape [2, 3, 4, 8]"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, tensors, words):
    with pytest.raises(DataError, match="use the folder with plain weights") as caught:
        PublicFolder.open(folder_of(tmp_path, tensors))
    assert words in str(caught.value)
