"""The public layers: constructors, shapes, losses, gradients, and what went wrong in their namesakes elsewhere."""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from moe_train import DeepSeekMoE, ExpertRouter, GraphCoupledMoE, MoELayer, SwitchFFN
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.errors import ConfigError
from moe_train.models.build import build_moe
from moe_train.moe.exchange import LocalExchange

DIM = 8
Build = Callable[[], nn.Module]
LAYERS: dict[str, Build] = {
    "MoELayer": lambda: MoELayer(DIM, 4, expert_hidden_dim=12),
    "MoELayer top-1": lambda: MoELayer(DIM, 4, top_k=1, expert_hidden_dim=12),
    "MoELayer with shared experts and jitter": lambda: MoELayer(
        DIM, 4, expert_hidden_dim=12, shared_expert=True, num_shared_experts=2, router_jitter=0.1
    ),
    "SwitchFFN": lambda: SwitchFFN(DIM, 4, 12),
    "DeepSeekMoE": lambda: DeepSeekMoE(DIM, 1, 4, 2, 12, num_segments=3),
    "DeepSeekMoE without shared experts": lambda: DeepSeekMoE(DIM, 0, 4, 2, 12),
    "GraphCoupledMoE": lambda: GraphCoupledMoE(DIM, 4, 12),
    "GraphCoupledMoE of blocks": lambda: GraphCoupledMoE(
        DIM, 4, 12, "block", orthogonality_loss_coef=0.1, adjacency="softmax", pooling="attention", combiner="linear"
    ),
}
ROUTERS: dict[str, Build] = {
    kind: lambda kind=kind: ExpertRouter(DIM, 4, 2, kind, jitter_noise=0.1)  # type: ignore[misc]
    for kind in ("softmax", "sigmoid", "noisy_top_k")
}
ALL = {**LAYERS, **ROUTERS}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
everything = pytest.mark.parametrize("build", ALL.values(), ids=ALL.keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens(dtype: torch.dtype = torch.float32, batch: int = 3, length: int = 10) -> Tensor:
    return torch.randn(batch, length, DIM).to(dtype)


def spread(layer: nn.Module) -> nn.Module:
    """Give routers decided opinions: initial weights are small."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "router" in name:
                parameter.normal_(0.0, 1.0)
    return layer


def size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("layer", "parameters"),
    [
        (MoELayer, "dim, num_experts, top_k=2, expert_hidden_dim=None"),
        (ExpertRouter, "dim, num_experts, top_k=2, gating_type='softmax'"),
        (SwitchFFN, "dim, num_experts, expert_dim=None, capacity_factor=1.25"),
        (
            DeepSeekMoE,
            "dim, num_shared_experts=2, num_routed_experts=64, top_k_experts=6, expert_dim=None, "
            "shared_expert_dim=None, num_segments=4, router_aux_loss_coef=0.001",
        ),
    ],
)
def test_constructors_are_as_documented(layer: type[nn.Module], parameters: str) -> None:
    given = [p for p in inspect.signature(layer).parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in given) == parameters


def test_the_weight_of_the_loss_of_switch_is_named_and_a_hundredth() -> None:
    assert inspect.signature(SwitchFFN).parameters["load_balance_loss_coef"].default == 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_layer
def test_the_output_is_as_the_input_and_the_loss_a_scalar(build: Build, dtype: torch.dtype) -> None:
    x_BSD = tokens(dtype)
    output, aux_loss = build()(x_BSD)
    assert output.shape == x_BSD.shape
    assert output.dtype == dtype
    assert aux_loss.shape == ()
    assert aux_loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_gives_weights_and_experts_per_token(kind: str) -> None:
    (weights, experts), aux_loss = ROUTERS[kind]()(tokens())
    assert weights.shape == experts.shape == (3, 10, 2)
    assert experts.dtype == torch.int64
    assert (experts[..., 0] != experts[..., 1]).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 10))
    assert aux_loss.shape == ()


def test_a_router_may_leave_weights_as_they_are() -> None:
    (weights, _), _ = spread(ExpertRouter(DIM, 4, normalize_weights=False))(tokens())
    assert (weights.sum(-1) < 1.0).all()


@everything
def test_every_parameter_gets_a_gradient_and_evaluation_has_no_loss(build: Build) -> None:
    layer, x_BSD = build(), tokens(batch=6)
    result, aux_loss = layer(x_BSD)
    output = result if isinstance(result, Tensor) else result.weights.square()
    (output.square().sum() + aux_loss).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    layer.eval()
    assert layer(x_BSD)[1].item() == 0.0


@everything
def test_manual_seed_governs_initial_values_and_draws(build: Build) -> None:
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        layer = build()
        result, aux_loss = spread(layer)(torch.ones(1, 5, DIM))
        return [*layer.parameters(), aux_loss, *([result] if isinstance(result, Tensor) else result)]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_noise_is_drawn_anew_in_each_pass_of_training_only() -> None:
    router, x_BSD = ExpertRouter(DIM, 8, 2, "noisy_top_k"), tokens()
    assert not torch.equal(router(x_BSD)[0].experts, router(x_BSD)[0].experts)
    router.eval()
    assert torch.equal(router(x_BSD)[0].experts, router(x_BSD)[0].experts)


def test_activation_checkpointing_draws_the_same_again() -> None:
    layer, x_BSD = spread(MoELayer(DIM, 4, expert_hidden_dim=12, router_jitter=0.5)), tokens()

    def gradients(checkpointed: bool) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(5)
        if checkpointed:
            output, aux_loss = torch.utils.checkpoint.checkpoint(layer, x_BSD, use_reentrant=False)
        else:
            output, aux_loss = layer(x_BSD)
        (output.square().sum() + aux_loss).backward()
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@everything
def test_on_the_meta_device_there_are_shapes_without_values(build: Build) -> None:
    with torch.device("meta"):
        layer = build()
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert size(layer) == size(build())


def test_a_default_device_does_not_change_initial_values() -> None:
    torch.manual_seed(3)
    first = MoELayer(DIM, 4)
    torch.manual_seed(3)
    with torch.device("cpu"):
        assert torch.equal(first.moe.experts.down_LFD, MoELayer(DIM, 4).moe.experts.down_LFD)


@pytest.mark.parametrize(
    ("layer", "hidden"),
    [
        (MoELayer(DIM, 4), 4 * DIM),
        (SwitchFFN(DIM, 4), 4 * DIM),
        (DeepSeekMoE(DIM, 0, 4, 2, num_segments=1), 4 * DIM),
        (MoELayer(DIM, 4, expert_hidden_dim=10), 10),
        (SwitchFFN(DIM, 4, expert_dim=10), 10),
    ],
)
def test_the_hidden_width_is_four_times_the_outer_unless_given(layer: nn.Module, hidden: int) -> None:
    assert layer.moe.experts.down_LFD.shape == (4, hidden, DIM)


def test_it_is_the_layer_of_the_models() -> None:
    """Same weights, same routing, same numbers as the trainer's own layer of that configuration."""
    public = spread(MoELayer(DIM, 4, 2, 12, shared_expert=True)).double()
    config = ModelConfig(dim=DIM, ffn=FFNConfig(num_experts=4, top_k=2, expert_dim=12, num_shared_experts=1))
    inner = build_moe(config, LocalExchange(4), 0.02).double()
    inner.load_state_dict(public.moe.state_dict())
    x_BSD = tokens(torch.float64)
    torch.testing.assert_close(public(x_BSD)[0], inner(x_BSD).y_BSD, rtol=0, atol=0)


def expected_output(layer: DeepSeekMoE | MoELayer, x_BSD: Tensor, normalised: bool) -> Tensor:
    """The routed and shared sums, token by token."""

    def swiglu(x_D: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x_D @ gate_up).chunk(2)
        return (nn.functional.silu(gate) * up) @ down

    moe, top_k = layer.moe, layer.moe.capacity.top_k
    out = []
    for x_D in x_BSD.flatten(0, 1):
        weights, experts = (moe.router.weight @ x_D).softmax(0).topk(top_k)
        weights = weights / weights.sum() if normalised else weights
        chosen = zip(weights, experts, strict=True)
        y_D = sum(w * swiglu(x_D, moe.experts.gate_up_LDF2[e], moe.experts.down_LFD[e]) for w, e in chosen)
        if moe.shared is not None:
            y_D = y_D + swiglu(x_D, moe.shared.gate_up.weight.T, moe.shared.down.weight.T)
        out.append(y_D)
    return torch.stack(out).view_as(x_BSD)


@pytest.mark.parametrize(
    ("layer", "normalised"),
    [
        (lambda: MoELayer(DIM, 4, 2, 12), True),
        (lambda: MoELayer(DIM, 4, 1, 12), False),
        (lambda: DeepSeekMoE(DIM, 2, 4, 2, 12, 5, num_segments=3), False),
    ],
)
def test_the_output_is_the_sum_over_chosen_and_shared_experts(layer: Build, normalised: bool) -> None:
    built, x_BSD = spread(layer()).double(), tokens(torch.float64)
    torch.testing.assert_close(built(x_BSD)[0], expected_output(built, x_BSD, normalised))


@pytest.mark.parametrize("build", [lambda: MoELayer(DIM, 4), lambda: ExpertRouter(DIM, 4)])
def test_the_loss_is_not_weighted_and_one_when_even(build: Build) -> None:
    layer = build()
    with torch.no_grad():
        (layer.moe.router if isinstance(layer, MoELayer) else layer.router).weight.zero_()
    assert layer(tokens())[1].item() == pytest.approx(1.0)


def test_the_loss_of_a_router_is_that_of_its_layer() -> None:
    layer, router = spread(MoELayer(DIM, 4)), ExpertRouter(DIM, 4)
    router.router.load_state_dict(layer.moe.router.state_dict())
    x_BSD = tokens()
    assert layer(x_BSD)[1].item() == router(x_BSD)[1].item() > 1.0


def test_the_loss_is_the_textbook_formula() -> None:
    router, x_BSD = spread(ExpertRouter(DIM, 4)), tokens()
    (_, experts), aux_loss = router(x_BSD)
    p_TE = (x_BSD @ router.router.weight.T).softmax(-1).view(-1, 4)
    f_E = experts.flatten().bincount(minlength=4) / experts.numel()
    expected = 4 * (f_E * p_TE.mean(0)).sum()
    torch.testing.assert_close(aux_loss, expected)
    (slope,) = torch.autograd.grad(aux_loss, router.router.weight)
    (expected_slope,) = torch.autograd.grad(expected, router.router.weight)
    torch.testing.assert_close(slope, expected_slope)


def test_the_loss_of_deepseek_is_of_each_sequence_alone() -> None:
    layer, x_BSD = spread(DeepSeekMoE(DIM, 0, 4, 1, 8, num_segments=2, router_aux_loss_coef=1.0)), tokens()
    alone = [layer(x_SD.unsqueeze(0))[1] for x_SD in x_BSD]
    torch.testing.assert_close(layer(x_BSD)[1], torch.stack(alone).mean())


@pytest.mark.parametrize(
    ("build", "name", "default"),
    [
        (partial(SwitchFFN, DIM, 4), "load_balance_loss_coef", 0.01),
        (partial(DeepSeekMoE, DIM, 1, 4, 2), "router_aux_loss_coef", 0.001),
    ],
)
def test_the_loss_is_weighted_where_the_layer_has_the_weight(
    build: Callable[..., nn.Module], name: str, default: float
) -> None:
    def loss(**weight: float) -> float:
        torch.manual_seed(1)
        return build(**weight)(tokens())[1].item()

    assert loss() == pytest.approx(default * loss(**{name: 1.0}))
    assert loss(**{name: 0.0}) == 0.0


# What went wrong elsewhere.


def test_segments_segment() -> None:
    """m times as many experts of 1/m the width, m times as many choices; elsewhere the argument had no effect."""
    whole, cut = DeepSeekMoE(DIM, 2, 8, 2, 12, num_segments=1), DeepSeekMoE(DIM, 2, 8, 2, 12, num_segments=3)
    assert whole.moe.experts.down_LFD.shape == (8, 12, DIM)
    assert cut.moe.experts.down_LFD.shape == (24, 4, DIM)
    assert (whole.moe.capacity.top_k, cut.moe.capacity.top_k) == (2, 6)
    assert size(whole.moe.experts) == size(cut.moe.experts), "no parameters more"
    active = [layer.moe.capacity.top_k * layer.moe.experts.down_LFD.shape[1] for layer in (whole, cut)]
    assert active[0] == active[1], "no FLOPs more"


def test_segments_of_a_whole_expert_are_that_expert() -> None:
    """If every token takes all of them with equal weight, the parts add up to what they were cut from."""
    whole, cut = DeepSeekMoE(DIM, 0, 1, 1, 12, num_segments=1), DeepSeekMoE(DIM, 0, 1, 1, 12, num_segments=3)
    gate, up = whole.moe.experts.gate_up_LDF2[0].chunk(2, dim=1)
    with torch.no_grad():
        cut.moe.router.weight.zero_()
        for i in range(3):
            part = slice(4 * i, 4 * i + 4)
            cut.moe.experts.gate_up_LDF2[i] = torch.cat([gate[:, part], up[:, part]], dim=1)
            cut.moe.experts.down_LFD[i] = whole.moe.experts.down_LFD[0, part]
    x_BSD = tokens()
    torch.testing.assert_close(3 * cut(x_BSD)[0], whole(x_BSD)[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda num: DeepSeekMoE(DIM, num, 4, 2, 12, 6),
        lambda num: MoELayer(DIM, 4, expert_hidden_dim=6, shared_expert=True, num_shared_experts=num),
    ],
)
def test_shared_experts_are_summed_not_averaged(build: Callable[[int], nn.Module]) -> None:
    one, two = build(1), build(2)
    gate, up = one.moe.shared.gate_up.weight.chunk(2)
    with torch.no_grad():
        two.moe.shared.gate_up.weight.copy_(torch.cat([gate, gate, up, up]))
        two.moe.shared.down.weight.copy_(one.moe.shared.down.weight.repeat(1, 2))
    x_BSD = tokens()
    torch.testing.assert_close(two.moe.shared(x_BSD), 2 * one.moe.shared(x_BSD))


def test_the_shared_width_is_that_of_the_routed_experts_unless_given() -> None:
    assert DeepSeekMoE(DIM, 2, 4, 2, 12).moe.shared.down.weight.shape == (DIM, 24)
    assert DeepSeekMoE(DIM, 2, 4, 2, 12, 5).moe.shared.down.weight.shape == (DIM, 10)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SwitchFFN(DIM, 4, 12, load_balance_loss_coef=0.0),
        lambda: DeepSeekMoE(DIM, 1, 4, 1, 12, num_segments=1, router_aux_loss_coef=0.0),
        lambda: MoELayer(DIM, 4, top_k=1, expert_hidden_dim=12),
    ],
)
def test_a_router_of_one_choice_learns_from_the_task(build: Build) -> None:
    """Elsewhere the weight was a softmax of one value, which is 1: no gradient."""
    layer = build()
    layer(tokens())[0].square().sum().backward()
    assert layer.moe.router.weight.grad.abs().sum() > 0


def test_the_weight_of_switch_is_the_probability() -> None:
    layer, x_BSD = spread(SwitchFFN(DIM, 4, 12)).eval(), tokens()
    doubled, _ = layer(x_BSD)
    p_BSE = (x_BSD @ layer.moe.router.weight.T).softmax(-1)
    with torch.no_grad():
        layer.moe.router.weight.mul_(1e4)  # probabilities become 1, choices stay
    torch.testing.assert_close(doubled, layer(x_BSD)[0] * p_BSE.amax(-1, keepdim=True))


def test_tokens_without_room_are_zeros_in_training_and_computed_in_evaluation() -> None:
    """Elsewhere they came back as their own input, which the residual then counted twice."""
    layer, x_BSD = SwitchFFN(DIM, 4, 12, capacity_factor=1.0), torch.ones(2, 8, DIM)
    output, _ = layer(x_BSD)
    taken_BS = output.abs().sum(-1) > 0
    assert taken_BS.sum(1).tolist() == [2, 2], "all want one expert, whose room is ceil(8 / 4)"
    assert taken_BS[:, :2].all(), "the earliest"
    assert (layer.eval()(x_BSD)[0].abs().sum(-1) > 0).all()


def test_the_jitter_of_switch_moves_the_routers_input_only() -> None:
    layer, x_BSD = SwitchFFN(DIM, 1, 12, capacity_factor=2.0), tokens()
    before = x_BSD.clone()
    in_training, _ = layer(x_BSD)
    assert torch.equal(x_BSD, before)
    torch.testing.assert_close(in_training, layer.eval()(x_BSD)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoELayer(0, 4, expert_hidden_dim=4), "dim=0: must be greater than 0"),
        (lambda: MoELayer(DIM, 4, top_k=5), "top_k=5: must not exceed num_experts=4"),
        (lambda: MoELayer(DIM, 4, top_k=0), "top_k=0: must be greater than 0"),
        (lambda: MoELayer(DIM, 4, router_jitter=1.0), "router_jitter=1.0: must be at least 0 and less than 1"),
        (lambda: MoELayer(DIM, 4, shared_expert=True, num_shared_experts=0), "num_shared_experts=0"),
        (lambda: SwitchFFN(DIM, 0), "num_experts=0: must be greater than 0"),
        (lambda: SwitchFFN(DIM, 4, capacity_factor=float("inf")), "capacity_factor=inf"),
        (lambda: SwitchFFN(DIM, 4, load_balance_loss_coef=-1.0), "load_balance_loss_coef=-1.0: must not be negative"),
        (lambda: DeepSeekMoE(DIM, num_segments=0), "num_segments=0: must be greater than 0"),
        (lambda: DeepSeekMoE(DIM, expert_dim=10), "num_segments=4: must divide expert_dim=10"),
        (lambda: DeepSeekMoE(DIM, 2, 4), "top_k_experts=6: must not exceed num_routed_experts=4"),
        (lambda: DeepSeekMoE(DIM, -1), "num_shared_experts=-1: must not be negative"),
        (lambda: DeepSeekMoE(DIM, router_aux_loss_coef=float("nan")), "router_aux_loss_coef=nan"),
        (
            lambda: ExpertRouter(DIM, 4, gating_type="magic"),
            "gating_type=magic: must be one of softmax, sigmoid, noisy",
        ),
        (lambda: ExpertRouter(DIM, 4, top_k=1), "top_k=1: normalised, the weight of one expert is always 1"),
        (lambda: ExpertRouter(DIM, 4, 2, "noisy_top_k", normalize_weights=False), "normalize_weights=False: "),
    ],
)
def test_bad_arguments_are_named(build: Build, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)


def test_all_bad_arguments_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        DeepSeekMoE(0, -1, 4, 6, 10)
    keys = {problem.key for problem in error.value.problems}
    assert keys == {"dim", "num_shared_experts", "top_k_experts", "num_segments"}
