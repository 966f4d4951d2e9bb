"""Published models have exactly the numbers of parameters that were computed elsewhere, to the unit.

Each row was computed from the published hyper-parameters with closed forms written apart from this project; those of
which transformers has a class equal that class's model (see test_published_configs.py).
"""

import functools
from pathlib import Path

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import Counts, count
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

ROWS = {
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral_8x22b": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "deepseek_moe_16b": (16_375_728_128, 2_828_650_496, 2_618_935_296),
    "deepseek_v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek_v3": (671_026_404_352, 37_552_282_624, 36_625_603_584),
    "qwen1_5_moe_a2_7b": (14_315_784_192, 2_689_173_504, 2_378_008_576),
    "qwen2_57b_a14b": (57_408_658_944, 14_249_270_784, 13_704_732_160),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3_235b_a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280, 1_178_994_688),
    "gpt_oss_20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "gpt_oss_120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
}
"""Total, active, active without the input embedding; multi-token prediction left out."""
V3_MODULE_WITH_BIAS = 11_610_068_224
"""One MTP module of DeepSeek-V3, the bias on the choice of its 256 experts counted, which is no parameter here."""
SWITCH = {
    8: 619_339_008,
    16: 1_072_397_568,
    32: 1_978_514_688,
    64: 3_790_748_928,
    128: 7_415_217_408,
    256: 14_664_154_368,
}
"""Total of the encoder-decoder by experts, as transformers has it: ReLU, one embedding for input and output."""


@functools.cache
def preset(*overrides: str) -> ModelConfig:
    return compose_config("train", TrainConfig, lambda config: [], list(overrides)).model


def counts_of(*overrides: str) -> Counts:
    return count(preset(*overrides), vocab_size=1, seq_len=1)


def built(config: ModelConfig) -> Transformer:
    exchange = LocalExchange(config.ffn.num_experts)
    return build_model(config, config.vocab_size or 1, exchange, "fp32", torch.device("meta"))


@pytest.mark.parametrize("name", ROWS)
def test_counts(name: str) -> None:
    size = counts_of(f"model={name}")
    assert (size.main, size.active, size.active_without_embedding) == ROWS[name]


def test_mixtral_8x22b_with_the_vocabulary_of_8x7b() -> None:
    assert counts_of("model=mixtral_8x22b", "model.vocab_size=32000").main == 140_620_634_112


def test_deepseek_v3_with_and_without_multi_token_prediction() -> None:
    size, without = counts_of("model=deepseek_v3"), counts_of("model=deepseek_v3", "model.mtp.depth=0")
    experts = 256
    assert size.mtp + experts == V3_MODULE_WITH_BIAS
    assert size.total == 671_026_404_352 + V3_MODULE_WITH_BIAS - experts == 682_636_472_320
    assert without.total == without.main == size.main == 671_026_404_352
    assert counts_of("model=deepseek_v3", "model.mtp.depth=2").mtp == 2 * size.mtp


@pytest.mark.parametrize(("depth", "values"), [(0, 14_848), (1, 14_848 + 256)])
def test_the_biases_of_deepseek_v3_are_no_parameters(depth: int, values: int) -> None:
    model = built(preset("model=deepseek_v3", f"model.mtp.depth={depth}"))
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("router.bias_E")]
    assert sum(bias.numel() for bias in biases) == values
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 671_026_404_352 + depth * (V3_MODULE_WITH_BIAS - 256)
    if depth == 0:
        assert parameters + values == 671_026_419_200, "what lies in the published files beside MTP"


def test_glam() -> None:
    size = counts_of("model=glam_64b_64e")
    assert f"{size.total / 1e12:.3f}T {size.active / 1e9:.2f}B" == "1.162T 96.60B"


@pytest.mark.parametrize("experts", SWITCH)
def test_a_switch_decoder_is_its_encoder_decoder_without_the_encoder(experts: int) -> None:
    """By hand: the published one has 12 encoder layers more, and in the decoder attention to the encoder.

    Also the relative positions, 32 x 12 in each stack, and the norms: three per decoder layer, and one more at the end.
    """
    dim, hidden, attention = 768, 3072, 4 * 768 * 768
    feed_forward = 6 * 2 * dim * hidden + 6 * (experts * 2 * dim * hidden + experts * dim)
    encoder = 12 * (attention + 2 * dim) + feed_forward + dim + 32 * 12
    cross_attention = 12 * (attention + dim) + 32 * 12
    size = counts_of(f"model=switch_base_{experts}")
    assert size.total + encoder + cross_attention == SWITCH[experts]
    assert size.total - size.active == 6 * (experts - 1) * 2 * dim * hidden


def test_every_published_preset_has_a_row_here() -> None:
    folder = Path(__file__).parents[2] / "configs" / "model"
    relatives = {"glam_64b_64e", *(f"switch_base_{experts}" for experts in SWITCH)}
    published = {path.stem for path in folder.glob("*.yaml") if "; exactly " in path.read_text().splitlines()[0]}
    own_test = {"graph_original"}  # test_graph_original_counts.py
    assert published == ROWS.keys() | relatives | own_test
