"""Multi-head latent attention on an example small enough for pencil and paper (DeepSeek-V2, arXiv 2405.04434, 2.1).

One head, a model 2 wide, a latent vector of one number, three tokens x = (1, 0), (1, 1) and (-1, 1). Per token
- latent: x_1, and normed c = 1, 1, -1, but for half a millionth (e = 1e-6 in the norm);
- key: (2 c, 0) without position, (x_2, 0) with it, turned by 1 radian per position; value: 3 c;
- query: (x_1, x_2) without position, (x_2, 0) with it, turned likewise.
So the score of token i for token j is 2 x_1(i) c(j) + x_2(i) x_2(j) cos(i - j), divided by sqrt(2 + 2) = 2.
"""

import math

import pytest
import torch
from torch import Tensor

from moe_train.config.attention import LatentConfig, YarnConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import LatentAttention
from moe_train.ops.rotary import rotary_table

TOKENS_SD = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
LATENTS = [1.0, 1.0, -1.0]
COS_1 = 0.5403023058681398


def attention_of(yarn: YarnConfig | None = None) -> LatentAttention:
    section = LatentConfig(kv_rank=1, nope_dim=2, rope_dim=2, v_dim=1, yarn=yarn)
    attention = LatentAttention(ModelConfig(dim=2, heads=1, attention=section), section, 1.0).double()
    rows = {
        "q": [[1, 0], [0, 1], [0, 1], [0, 0]],  # without position: x; with it: (x_2, 0)
        "kv_down": [[1, 0], [0, 1], [0, 0]],  # latent x_1, shared key (x_2, 0)
        "kv_up": [[2], [0], [3]],  # key (2 c, 0), value 3 c
        "out": [[1], [10]],
    }
    for name, values in rows.items():
        getattr(attention, name).weight.data = torch.tensor(values, dtype=torch.float64)
    attention.kv_norm.weight.data = torch.ones(1, dtype=torch.float64)
    return attention


def result(attention: LatentAttention) -> Tensor:
    rotary = rotary_table(3, 2, attention.sizes, torch.float64, torch.device("cpu"))
    output_SD: Tensor = attention(TOKENS_SD.unsqueeze(0), rotary)[0]
    return output_SD


def weighted(scores: list[float]) -> float:
    """Σ softmax(scores / 2) · 3 c."""
    exponentials = [math.exp(score / 2) for score in scores]
    return sum(e * 3 * c for e, c in zip(exponentials, LATENTS, strict=False)) / sum(exponentials)


def assert_found(attention: LatentAttention, expected: list[float]) -> None:
    """The output projection writes the value, and ten times the value. The tolerance is that of e in the norm."""
    found_SD = result(attention)
    assert found_SD[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert found_SD[:, 1].tolist() == pytest.approx([10 * y for y in expected], abs=1e-4)


def test_three_tokens() -> None:
    """The first two tokens see values of 3 alone.

    Third: scores -2, -2 + 0.54030, 3; e^-1 = 0.36788, e^-0.72985 = 0.48198, e^1.5 = 4.48169, together 5.33155;
    3 (0.36788 + 0.48198 - 4.48169) / 5.33155 = -2.04359.
    """
    assert weighted([-2.0, -2.0 + COS_1, 3.0]) == pytest.approx(-2.04359, abs=5e-6)
    assert_found(attention_of(), [3.0, 3.0, -2.04359])


def test_yarn_scales_all_scores() -> None:
    """With factor e^10 and mscale_all_dim = 1 its magnitude is 0.1 · 10 + 1 = 2, and scores are 4 times as large.

    The pair of this width turns fast enough to stay as it is. e^-4 = 0.01832, e^-2.91940 = 0.05397, e^6 = 403.42879,
    together 403.50108; 3 (0.01832 + 0.05397 - 403.42879) / 403.50108 = -2.99893.
    """
    yarn = YarnConfig(factor=math.exp(10), mscale=1.0, mscale_all_dim=1.0)
    expected = weighted([4 * -2.0, 4 * (-2.0 + COS_1), 4 * 3.0])
    assert expected == pytest.approx(-2.99893, abs=5e-6)
    assert_found(attention_of(yarn), [3.0, 3.0, expected])


def test_yarn_scales_what_is_rotated() -> None:
    """With factor e^10, mscale = 2 and mscale_all_dim = 0 both rotated parts are 0.2 · 10 + 1 = 3 times as large.

    Scores -2, -2 + 9 · 0.54030, 2 + 9; e^-1 = 0.36788, e^1.43136 = 4.18439, e^5.5 = 244.69193, together 249.24420;
    3 (0.36788 + 4.18439 - 244.69193) / 249.24420 = -2.89041.
    """
    yarn = YarnConfig(factor=math.exp(10), mscale=2.0, mscale_all_dim=0.0)
    expected = weighted([-2.0, -2.0 + 9 * COS_1, 2.0 + 9.0])
    assert expected == pytest.approx(-2.89041, abs=5e-6)
    assert_found(attention_of(yarn), [3.0, 3.0, expected])
