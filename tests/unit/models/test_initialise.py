"""Initial values: they depend on the seed, the name and the expert's global index, and on nothing else."""

import dataclasses

import pytest
import torch
from model_samples import FEATURES, VARIANTS, VOCAB, build, config_of
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, roles_of


@dataclasses.dataclass(frozen=True)
class HalfExchange(LocalExchange):
    """As a rank of an EP group of two would hold the experts."""

    place: int = 0

    @property
    def experts(self) -> range:
        held = self.num_experts // 2
        return range(self.place * held, (self.place + 1) * held)


def values(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def half(place: int, config: ModelConfig) -> Transformer:
    model = Transformer(config, VOCAB, HalfExchange(config.ffn.num_experts, place), torch.float64).double()
    initialise(model, 0)
    return model


@pytest.mark.parametrize("variant", ["top-2", *FEATURES])
def test_trap_31_each_global_expert_starts_the_same_at_every_ep_size(variant: str) -> None:
    config = config_of(*(VARIANTS | FEATURES)[variant])
    whole, halves = build(config), [half(place, config) for place in (0, 1)]
    roles = roles_of(whole)
    for name, expected in values(whole).items():
        parts = [values(part)[name] for part in halves]
        if roles[name].kind is Kind.EXPERT:
            assert torch.equal(torch.cat(parts), expected), name
        else:
            assert all(torch.equal(part, expected) for part in parts), name


def test_trap_31_no_two_tensors_start_alike() -> None:
    """Experts that start alike stay alike: they would be one expert."""
    drawn = []
    model = build(config_of())
    for name, role in roles_of(model).items():
        if role.std is not None:
            value = values(model)[name]
            drawn += list(value) if role.kind is Kind.EXPERT else [value]
    firsts = [tensor.flatten()[:8].tolist() for tensor in drawn]
    assert len(firsts) > 2 * 2 * 4, "two expert tensors per layer, four experts"
    assert all(a != b for i, a in enumerate(firsts) for b in firsts[:i])


def test_fp32_and_fp64_draw_the_same_numbers() -> None:
    single, double = values(build(config_of(), "fp32")), values(build(config_of(), "fp64"))
    for name, value in single.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.double(), double[name]), name


def test_the_seed_decides() -> None:
    first, again, other = (values(build(config_of(), seed=seed)) for seed in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        if value.dim() > 1:
            assert not torch.equal(value, other[name]), name


def test_the_surroundings_do_not() -> None:
    """Neither torch's global generator nor the other layers: more of them leave these as they are."""
    torch.manual_seed(1)
    few = values(build(config_of("model.init_std=0.02")))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    many = values(build(config_of("model.init_std=0.02", "model.layers=5")))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in few.items():
        if "down" not in name and "attention.out" not in name:  # their deviation follows the number of layers
            assert torch.equal(value, many[name]), name


WITH_BIASES = config_of(*FEATURES["window, sinks, biases everywhere"], "model.dim=64", "model.heads=32")


def test_biases_of_projections_start_at_zero() -> None:
    """All but the sinks, which are scores and start like weights."""
    found = {name: value for name, value in values(build(WITH_BIASES)).items() if "bias" in name}
    assert {name.rpartition(".")[2] for name in found} == {
        "bias", "gate_up_bias_LF2", "down_bias_LD", "logit_bias_E",
    }  # fmt: skip
    for name, value in found.items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_sinks_start_like_weights() -> None:
    sinks = torch.stack([value for name, value in values(build(WITH_BIASES)).items() if name.endswith("sinks_H")])
    assert sinks.shape == (2, 32)
    assert sinks.std().item() == pytest.approx(0.3, rel=4 / sinks.numel() ** 0.5)
    assert len(sinks.unique()) == 64


def test_modules_of_multi_token_prediction_leave_the_rest_as_it_is() -> None:
    plain, further = (values(build(config_of(f"model.mtp.depth={depth}"))) for depth in (0, 2))
    assert plain.keys() == {name for name in further if not name.startswith("mtp.")}
    for name, value in plain.items():
        assert torch.equal(value, further[name]), name
    assert not torch.equal(further["mtp.0.project.weight"], further["mtp.1.project.weight"])


@pytest.mark.parametrize("layers", [1, 8])
def test_standard_deviations(layers: int) -> None:
    model = build(config_of("model.dim=64", "model.init_std=0.02", f"model.layers={layers}", "model.ffn.expert_dim=64"))
    for name, value in values(model).items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
            continue
        writes_residual = "down" in name or "attention.out" in name
        expected = 0.02 / (2 * layers) ** 0.5 if writes_residual else 0.02
        spread = 4 / value.numel() ** 0.5  # of an estimated deviation: more than five of its own deviations
        assert value.std().item() == pytest.approx(expected, rel=spread), name


SWITCH = ("model=switch_tiny", "model.dim=64", "model.ffn.num_experts=8", "model.init_std=0.02")


def test_switch_routers_start_small_and_within_two_deviations() -> None:
    """Truncated normal, deviation sqrt(0.1 / fan-in), values beyond two drawn again (Switch, 2.4)."""
    weights = [value for name, value in values(build(config_of(*SWITCH))).items() if "router" in name]
    drawn = torch.stack(weights)
    sigma = (0.1 / 64) ** 0.5
    assert drawn.abs().max().item() <= 2 * sigma
    assert drawn.abs().max().item() > 1.9 * sigma
    # Of a normal cut at two deviations: sqrt(1 - 4 φ(2) / (2 Φ(2) - 1)).
    assert drawn.std().item() == pytest.approx(0.8796 * sigma, rel=4 / drawn.numel() ** 0.5)


def test_trap_39_truncated_values_come_from_a_generator_of_their_own() -> None:
    """From torch's global one, every rank would start with other routers."""
    torch.manual_seed(1)
    first = values(build(config_of(*SWITCH)))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = values(build(config_of(*SWITCH)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_biases_start_at_zero_whatever_the_memory_held() -> None:
    model = build(config_of("model.ffn.router.kind=sigmoid", "+model.ffn.balance.loss_free.rate=0.5"))
    biases = [layer.router.bias_E for layer in model.moe_layers.values()]
    for bias_E in biases:
        bias_E.fill_(float("nan"))
    initialise(model, 0)
    assert len(biases) == 2
    assert all(torch.equal(bias_E, torch.zeros_like(bias_E)) for bias_E in biases)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("fp32", torch.float32)])
def test_trap_19_routers_and_their_biases_are_kept_in_fp32(precision: str, dtype: torch.dtype) -> None:
    model = build(config_of("model.ffn.router.kind=sigmoid", "+model.ffn.balance.loss_free.rate=0.5"), precision)
    for layer in model.moe_layers.values():
        assert layer.router.bias_E.dtype == layer.router.weight.dtype == dtype
