"""Runs the product's training step in any layout on a given list of global batches, and gathers what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from oracle import BOUNDARY, IGNORE, Split, Truth
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.config.compose import compose_config
from moe_train.config.model import FFNConfig
from moe_train.config.schema import TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.mesh import Mesh
from moe_train.models.classifier import TextClassifier
from moe_train.models.exchange import model_exchange
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.layer import MoELayer
from moe_train.moe.roles import Kind, roles_of
from moe_train.parallel.engine import Engine, TorchEngine
from moe_train.parallel.shard import shard
from moe_train.training.optim import build_optimizer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

VOCAB, LENGTH, BATCH, STEPS = 23, 6, 16, 3
RATES = [1e-2, 2e-2, 1e-2]
SMALL = [
    "model.dim=8", "model.layers=2", "model.heads=2", "model.init_std=0.3",
    "model.ffn.num_experts=4", "model.ffn.expert_dim=6", "model.ffn.hidden_dim=10", "train.clip_norm=0.5",
    "model.ffn.balance.aux.coef=0.1", "model.ffn.balance.z_loss.coef=0.01", f"train.steps={STEPS}",
]  # fmt: skip
SECTIONS = ("router", "balance", "capacity")


@dataclass(frozen=True)
class Case:
    """One model and batch; a layout says how it is run.

    Attributes:
        name: what it shows.
        overrides: of the configuration; ``router.``, ``balance.`` and ``capacity.`` stand for ``model.ffn.router.`` ...
        zero_router: equal logits: every token chooses the experts with the lowest indices.
        start_bias: size of the biases of loss-free balancing before the first step.
        padding: none, uneven, or whole ranks without a valid token.
        text: random; the same sequence everywhere; or sequences that repeat one token, so that tokens are equal.
        truth: oracle; or one rank: the product's own run there, for a router whose best choice is not unique.
    """

    name: str
    overrides: tuple[str, ...] = ()
    zero_router: bool = False
    start_bias: float = 0.0
    padding: str = "none"
    text: str = "random"
    truth: str = "oracle"

    def __str__(self) -> str:
        return self.name

    def config(self) -> TrainConfig:
        return self.composed

    @cached_property
    def composed(self) -> TrainConfig:
        """Travels with the case to the ranks, which need not compose it again."""
        full = [f"model.ffn.{key}" if key.startswith(SECTIONS) else key for key in self.overrides]
        is_other = any(key in full for key in ("model.attention.kind=mla", "model.attention.kind=switchhead"))
        heads = [] if is_other else ["model.attention.kv_heads=1"]
        has_graph = any(key.startswith("model=graph_") for key in full)
        small = [key for key in SMALL if not (has_graph and key.startswith("model.ffn.balance."))]  # nothing is routed
        return compose_config("train", TrainConfig, lambda config: [], [*small, *heads, *full])

    def split(self, world_size: int, accumulation: int) -> Split:
        """What the truth has to know of a layout: nothing, but for rules that count over a pass or over a rank."""
        return {"step": Split(), "pass": Split(accumulation), "rank": Split(accumulation, world_size)}[self.counts_over]

    @property
    def counts_over(self) -> str:
        """The widest rule: step (or sequence: the contract holds), pass (equal accumulation), rank (no contract)."""
        return counts_over(self.config().model.ffn)

    def batches(self) -> list[tuple[Tensor, ...]]:
        """Tokens and labels of each step; of texts with classes also which places hold tokens."""
        head = self.config().model.classifier
        generator = torch.Generator().manual_seed(7)
        made = []
        for _ in range(STEPS):
            text = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
            if self.text == "one sequence":
                text[:] = text[0]
            if self.text == "one token per sequence":
                text[:] = text[:, :1]
            tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
            if self.padding == "uneven":
                lengths = torch.randint(0, LENGTH + 1, (BATCH,), generator=generator)
                labels[torch.arange(LENGTH) >= lengths.unsqueeze(1)] = IGNORE
            if self.padding == "whole ranks":
                labels[: BATCH // 2] = IGNORE
            made.append((tokens, labels) if head is None else as_texts(tokens, labels, head.num_classes, generator))
        return made

    def prepare(self, model: Transformer) -> Transformer:
        """Give values, none of them zero: routers' noise and biases start there, where gradients vanish or hide."""
        initialise(model, seed=3)
        generator, roles = torch.Generator().manual_seed(5), roles_of(model)
        for name, parameter in model.named_parameters():
            role = roles[name]
            if role.kind is Kind.ROUTER and self.zero_router:
                parameter.data.zero_()
            elif not parameter.any():
                # Of all experts, so that every layout draws the same.
                whole = [self.config().model.ffn.num_experts] if role.kind is Kind.EXPERT else parameter.shape[:1]
                values = torch.empty(*whole, *parameter.shape[1:]).normal_(0.0, 0.3, generator=generator)
                parameter.data.copy_(values[list(role.experts)] if role.kind is Kind.EXPERT else values)
        for layer in model.expert_layers.values():
            for bias_E in layer.router.buffers() if isinstance(layer, MoELayer) else ():
                bias_E.copy_(self.start_bias * torch.empty(bias_E.shape).normal_(generator=generator))
        if isinstance(model, TextClassifier) and model.naive_bayes is not None:
            ratios_NC = model.naive_bayes.ratios_NC
            ratios_NC.copy_(torch.empty(ratios_NC.shape).normal_(generator=generator))
        if isinstance(model, TextClassifier) and model.lexicon is not None:
            words = [(token, *rest) for token in range(0, VOCAB, 2) for rest in ((), ((3 * token) % VOCAB,))]
            model.lexicon.fill({word: rating - len(words) / 4 + 0.1 for rating, word in enumerate(words)})
        return model

    def whole_model(self) -> Transformer:
        model = self.config().model
        return self.prepare(
            build_model(model, VOCAB, LocalExchange(model.ffn.num_experts), "fp64", torch.device("cpu"))
        )


def as_texts(tokens_BS: Tensor, labels_BS: Tensor, num_classes: int, generator) -> tuple[Tensor, Tensor, Tensor]:
    """What has a label is a token of a text, whose class stands at its last one; some rows have no text."""
    valid_BS = labels_BS != IGNORE
    lengths_B, rows_B = valid_BS.sum(dim=1), valid_BS.any(dim=1)
    classes_BS = torch.full_like(labels_BS, IGNORE)
    drawn_B = torch.randint(0, num_classes, (len(tokens_BS),), generator=generator)
    classes_BS[rows_B, lengths_B[rows_B] - 1] = drawn_B[rows_B]
    return tokens_BS, classes_BS, valid_BS


def counts_over(ffn: FFNConfig) -> str:
    """The tokens that the widest rule of a layer counts over, as far as these depend on the layout."""
    balance = (ffn.balance.aux, ffn.balance.entropy, ffn.balance.device, ffn.balance.communication)
    scopes = {getattr(ffn.capacity, "scope", "sequence"), *(loss.scope for loss in balance if loss is not None)}
    if scopes & {"rank", "micro"}:
        return "rank"
    sees_pass = getattr(ffn.capacity, "scope", None) == "global" or ffn.router.kind in ("sinkhorn", "base")
    return "pass" if sees_pass else "step"


def rank_batches(batch: tuple[Tensor, ...], rank: int, world_size: int, accumulation: int) -> list[Batch]:
    """The micro-batches of one rank: the rule of the loader."""
    rows = BATCH // (world_size * accumulation)
    starts = [micro * world_size * rows + rank * rows for micro in range(accumulation)]
    parts = [[tensor[s : s + rows] for tensor in batch] for s in starts]
    return [Batch(part[0], part[1], s, *part[2:]) for s, part in zip(starts, parts, strict=True)]


def gathered(model: Transformer, mesh: Mesh, pick) -> dict[str, Tensor]:
    """Whole tensors of every parameter, of whatever shards: the experts of an EP group one after the other."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = pick(parameter).detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        if roles_of(model)[name].kind is Kind.EXPERT:
            parts = [torch.empty_like(value) for _ in range(mesh.ep.size())]
            dist.all_gather(parts, value, group=mesh.ep)
            value = torch.cat(parts)
        whole[name] = value
    return whole


def torch_engine(mesh: Mesh, case: Case, precision: str) -> TorchEngine:
    """The product's own engine; it shards where the mesh does."""
    config = case.config()
    exchange = model_exchange(mesh, config.model)
    model = case.prepare(build_model(config.model, VOCAB, exchange, precision, torch.device("cpu")))
    if mesh.sharding is not None:
        shard(model, mesh, torch.bfloat16 if precision == "bf16" else None)
    return TorchEngine(model, build_optimizer(model, config.optim), mesh)


PRECISION = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def run_layout(
    mesh: Mesh,
    case: Case,
    accumulation: int,
    dtype: torch.dtype = torch.float64,
    make_engine: Callable[[Mesh, Case, str], Engine] = torch_engine,
) -> Truth:
    """Train on this layout; ``dtype`` is that of the activations."""
    config = case.config()
    engine = make_engine(mesh, case, PRECISION[dtype])
    model = engine.model
    truth = Truth()
    for step, (batch, rate) in enumerate(zip(case.batches(), RATES, strict=False)):
        tokens = int((batch[1] != IGNORE).sum())
        micro_batches = rank_batches(batch, mesh.rank, mesh.layout.world_size, accumulation)
        settings = replace(settings_at(step, config, BOUNDARY), learning_rate=rate)
        valid = int(batch[2].sum()) if len(batch) > 2 else None
        result = train_step(engine, mesh, micro_batches, tokens, settings, valid)
        truth.figures.append(result.tally.measure(tokens, mesh))
        truth.norms.append(result.grad_norm.item())
    truth.gradients = gathered(model, mesh, lambda p: p.grad)
    truth.weights = gathered(model, mesh, lambda p: p)
    truth.biases = {name: bias_E.clone() for name, bias_E in model.named_buffers()}
    return truth


def differences(found: Truth, truth: Truth, tolerance: float) -> list[str]:
    """What is further from the truth than ``tolerance``, relative to the size of the number or tensor."""
    wrong = []
    for step, (a, b) in enumerate(zip(found.norms, truth.norms, strict=True)):
        if not abs(a - b) <= tolerance * max(1.0, abs(b)):
            wrong.append(f"norm of step {step}: {a} is not {b}")
    for step, (figures, true) in enumerate(zip(found.figures, truth.figures, strict=True)):
        assert figures.keys() == true.keys(), figures.keys() ^ true.keys()
        for key, value in true.items():
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (figures[key], value))
            if not bool(((a - b).abs() <= tolerance * b.abs().clamp(min=1.0)).all()):
                wrong.append(f"{key} of step {step}: {figures[key]} is not {value}")
    for name in ("gradients", "weights", "biases"):
        a, b = getattr(found, name), getattr(truth, name)
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for key in b:
            error = float((a[key].double() - b[key].double()).abs().max() / b[key].abs().max().clamp(min=1e-2))
            if not error <= tolerance:
                wrong.append(f"{name} of {key} differ by {error:.1e}")
    return wrong
