"""Rotary positions: the formula, what it is for, and YaRN against a loop and against transformers."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_train.config.attention import Llama3Config, RotaryConfig, YarnConfig
from moe_train.ops.rotary import Rotary, frequencies, rotary_magnitude, rotary_table, rotate, score_magnitude

QUICK = settings(max_examples=60, deadline=None)
WIDTH, LENGTH = 4, 7
CPU = torch.device("cpu")
PLAIN = RotaryConfig(rope_theta=100.0)
YARNS = {
    "deepseek_v2": YarnConfig(mscale=1.0, mscale_all_dim=1.0),
    "deepseek_v2_lite": YarnConfig(mscale=0.707, mscale_all_dim=0.707),
    "unequal magnitudes": YarnConfig(factor=8.0, mscale=1.5, mscale_all_dim=0.5),
    "gpt_oss": YarnConfig(factor=32.0, truncate=False),
    "short": YarnConfig(factor=4.0, original_length=16),
    "other bounds": YarnConfig(factor=16.0, original_length=512, beta_fast=8.0, beta_slow=2.0),
    "bounds between two pairs": YarnConfig(factor=16.0, beta_fast=1.5, beta_slow=1.4, truncate=False),
}
EACH_YARN = pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS.keys())


def table(config: RotaryConfig = PLAIN, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Rotary:
    return rotary_table(LENGTH, width, config, dtype, CPU)


def heads(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, LENGTH, WIDTH, dtype=torch.float64, generator=generator)


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    x = heads(3, 0)
    angles_SW = torch.outer(torch.arange(LENGTH).double(), torch.tensor([1.0, 0.1], dtype=torch.float64))
    pairs = torch.complex(x[..., : WIDTH // 2], x[..., WIDTH // 2 :])
    expected = pairs * torch.polar(torch.ones_like(angles_SW), angles_SW)
    assert torch.allclose(rotate(x, table()), torch.cat([expected.real, expected.imag], dim=-1), rtol=0, atol=1e-14)


@QUICK
@given(st.integers(1, 40), st.floats(2.0, 1e6), st.integers(0, 5000))
def test_frequencies_follow_the_formula(pairs: int, theta: float, position: int) -> None:
    """theta_i = base^(-2 (i - 1) / d), i from 1 (RoFormer, eq. 15)."""
    rotary = rotary_table(position + 1, 2 * pairs, RotaryConfig(rope_theta=theta), torch.float64, CPU)
    for i in range(1, pairs + 1):
        angle = position * math.pow(theta, -2 * (i - 1) / (2 * pairs))
        assert rotary.cos_SW[position, i - 1].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert rotary.sin_SW[position, i - 1].item() == pytest.approx(math.sin(angle), abs=1e-9)


@pytest.mark.parametrize("yarn", [None, *YARNS.values()], ids=["plain", *YARNS])
def test_scores_depend_on_the_distance_only(yarn: YarnConfig | None) -> None:
    """The property that rotary positions exist for (RoFormer, section 3.3)."""
    rotary = table(RotaryConfig(rope_theta=100.0, yarn=yarn))
    q, k = (rotate(heads(1, seed)[:, :, :1].expand(-1, -1, LENGTH, -1), rotary) for seed in (0, 1))
    scores_BHSS = q @ k.transpose(2, 3)
    for distance in range(-LENGTH + 1, LENGTH):
        along = scores_BHSS.diagonal(distance, dim1=2, dim2=3)
        assert torch.allclose(along, along[..., :1].expand_as(along), rtol=0, atol=1e-12)
    assert scores_BHSS.std() > 0.1, "but they do depend on it"


def test_bf16_is_rotated_in_the_precision_of_the_table() -> None:
    x, rotary = heads(1, 0), table(dtype=torch.float32)
    found = rotate(x.bfloat16(), rotary)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.bfloat16().float(), rotary).bfloat16())


def test_late_positions_keep_their_phase_in_fp32() -> None:
    """Angles are multiplied in fp64: in fp32 they are wrong by whole turns of a hundredth at a million tokens."""
    length = 1_000_001
    single = rotary_table(length, 2, PLAIN, torch.float32, CPU)
    assert single.cos_SW.dtype == torch.float32
    assert single.cos_SW[-1, 0].item() == pytest.approx(math.cos(1e6), abs=1e-7)
    wide = rotary_table(length, 64, RotaryConfig(rope_theta=1e4), torch.float32, CPU)
    assert wide.sin_SW[-1, 3].item() == pytest.approx(math.sin(1e6 * 1e4 ** (-6 / 64)), abs=1e-6)


def frequency_of(pair: int, width: int, config: RotaryConfig) -> float:
    """YaRN's frequency of one pair, in the words of its section 3.2, with bounds as pairs of fractional index."""
    yarn = config.yarn
    assert yarn is not None
    plain = config.rope_theta ** (-2 * pair / width)

    def bound(turns: float) -> float:
        """The index at which original_length · frequency = 2 π · turns."""
        return -math.log(2 * math.pi * turns / yarn.original_length) / math.log(config.rope_theta) * width / 2

    first, last = bound(yarn.beta_fast), bound(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if pair <= first:
        return plain
    if pair >= last:
        return plain / yarn.factor
    share = (pair - first) / (last - first)
    return (1 - share) * plain + share * plain / yarn.factor


@QUICK
@given(st.data())
def test_yarn_equals_a_loop_over_pairs(data: st.DataObject) -> None:
    width = 2 * data.draw(st.integers(1, 48))
    slow = data.draw(st.floats(0.2, 4.0))
    yarn = YarnConfig(
        factor=data.draw(st.floats(1.01, 64.0)),
        original_length=data.draw(st.integers(64, 8192)),
        beta_slow=slow,
        beta_fast=slow * data.draw(st.floats(1.5, 40.0)),
        truncate=data.draw(st.booleans()),
    )
    config = RotaryConfig(rope_theta=data.draw(st.sampled_from([500.0, 1e4, 1.5e5, 1e6])), yarn=yarn)
    assume(yarn.original_length > 2 * math.pi * yarn.beta_fast)
    found_W = frequencies(width, config, CPU)
    expected = [frequency_of(pair, width, config) for pair in range(width // 2)]
    assert found_W.dtype == torch.float64
    assert found_W.tolist() == pytest.approx(expected, rel=1e-9)


@EACH_YARN
def test_fast_frequencies_stay_and_slow_ones_are_stretched(yarn: YarnConfig) -> None:
    """Wide heads, so that both kinds are there, with those between in order."""
    config, width = RotaryConfig(yarn=yarn), 256
    plain_W = frequencies(width, RotaryConfig(), CPU)
    ratio_W = plain_W / frequencies(width, config, CPU)
    turns_W = plain_W * yarn.original_length / (2 * math.pi)
    step = 10_000.0 ** (2 / width)  # rounding outwards moves a bound by less than one pair
    fast_W, slow_W = turns_W > yarn.beta_fast * step, turns_W < yarn.beta_slow / step
    assert slow_W.any()
    assert torch.allclose(ratio_W[fast_W], torch.ones_like(ratio_W[fast_W]), rtol=1e-12)
    assert torch.allclose(ratio_W[slow_W], torch.full_like(ratio_W[slow_W], yarn.factor), rtol=1e-12)
    assert (ratio_W.diff() >= -1e-9).all()


def transformers_yarn(width: int, theta: float, yarn: YarnConfig) -> tuple[Tensor, float]:
    """Frequencies and magnitude as transformers makes them. It reads mscale only beside mscale_all_dim."""
    parameters = {
        "rope_type": "yarn", "rope_theta": theta, "factor": yarn.factor, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow, "original_max_position_embeddings": yarn.original_length,
        "truncate": yarn.truncate, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width, rope_parameters=parameters,
        max_position_embeddings=int(yarn.factor * yarn.original_length),
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS["yarn"](config, CPU)


@EACH_YARN
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("width", "theta"), [(64, 10_000.0), (64, 150_000.0), (16, 1_000.0), (128, 1e6)])
def test_yarn_equals_transformers(yarn: YarnConfig, truncate: bool, width: int, theta: float) -> None:
    yarn = yarn.model_copy(update={"truncate": truncate})
    config = RotaryConfig(rope_theta=theta, yarn=yarn)
    expected_W, size = transformers_yarn(width, theta, yarn)
    assert torch.allclose(frequencies(width, config, CPU).float(), expected_W, rtol=2e-6, atol=0)
    assert rotary_magnitude(yarn) == pytest.approx(size, rel=1e-12)
    rotary = rotary_table(LENGTH, width, config, torch.float32, CPU)
    angles_SW = torch.outer(torch.arange(LENGTH).float(), expected_W)
    assert torch.allclose(rotary.cos_SW, size * angles_SW.cos(), rtol=0, atol=4e-6)
    assert torch.allclose(rotary.sin_SW, size * angles_SW.sin(), rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "rotated", "scores"),
    [
        (1.0, 0.0, 1.3688879, 1.0),  # 0.1 ln 40 + 1: YaRN's own recommendation
        (1.0, 1.0, 1.0, 1.8738542),  # DeepSeek-V3: all in the scores
        (0.707, 0.707, 1.0, 1.5896266),  # DeepSeek-V2
        (2.0, 1.0, 1.7377759 / 1.3688879, 1.8738542),
    ],
)
def test_magnitudes(mscale: float, mscale_all_dim: float, rotated: float, scores: float) -> None:
    yarn = YarnConfig(factor=40.0, mscale=mscale, mscale_all_dim=mscale_all_dim)
    assert rotary_magnitude(yarn) == pytest.approx(rotated, abs=1e-6)
    assert score_magnitude(yarn) == pytest.approx(scores, abs=1e-6)
    size = table(RotaryConfig(yarn=yarn)).cos_SW[0]
    assert size.tolist() == pytest.approx([rotated] * 2, abs=1e-6)


def test_without_yarn_scores_keep_their_size() -> None:
    assert score_magnitude(None) == 1.0
    rotary = table()
    assert torch.allclose(rotary.cos_SW**2 + rotary.sin_SW**2, torch.ones_like(rotary.cos_SW), rtol=0, atol=1e-14)


def test_a_factor_close_to_one_is_plain() -> None:
    yarn = YarnConfig(factor=1.0 + 1e-9, mscale_all_dim=1.0)
    stretched, plain = table(RotaryConfig(yarn=yarn), width=16), table(RotaryConfig(), width=16)
    assert torch.allclose(stretched.cos_SW, plain.cos_SW, rtol=0, atol=1e-8)
    assert torch.allclose(stretched.sin_SW, plain.sin_SW, rtol=0, atol=1e-8)
    assert score_magnitude(yarn) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(("width", "theta"), [(64, 500_000.0), (128, 500_000.0), (16, 100.0)])
@pytest.mark.parametrize(
    "llama3",
    [Llama3Config(), Llama3Config(factor=32.0), Llama3Config(original_length=64, high_freq_factor=2.5)],
    ids=["3.1", "3.2", "short"],
)
def test_llama_3_equals_transformers(llama3: Llama3Config, width: int, theta: float) -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": llama3.factor,
        "original_max_position_embeddings": llama3.original_length,
        "low_freq_factor": llama3.low_freq_factor, "high_freq_factor": llama3.high_freq_factor,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=2 * width, num_attention_heads=2, head_dim=width, rope_parameters=parameters)
    expected_W, size = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    found_W = frequencies(width, RotaryConfig(rope_theta=theta, llama3=llama3), CPU)
    assert torch.allclose(found_W.float(), expected_W, rtol=2e-6, atol=0)
    plain_W = frequencies(width, RotaryConfig(rope_theta=theta), CPU)
    turns_W = plain_W * llama3.original_length / (2 * math.pi)
    assert torch.equal(found_W < plain_W, turns_W < llama3.high_freq_factor)
    assert size == 1.0
