"""Every preset is built and runs forward and backward, with its own widths, on a few tokens."""

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.groups import config_dir
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.ops.loss import cross_entropy_sum

TINY = sorted(path.stem for path in (config_dir() / "model").glob("*_tiny.yaml"))
VOCAB = 64


@pytest.mark.parametrize("preset", TINY)
def test_runs(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = compose_config("train", TrainConfig, train_problems, [f"model={preset}"]).model
    model = build_model(config, VOCAB, LocalExchange(config.ffn.num_experts), "fp32", torch.device("cpu"))
    initialise(model, 0)
    tokens_BS = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    loss = cross_entropy_sum(model(tokens_BS).logits_BSV.flatten(0, 1), tokens_BS.flatten()) / tokens_BS.numel()
    loss.backward()
    assert 0.5 < loss.item() / torch.tensor(float(VOCAB)).log().item() < 1.5, "near the uniform guess"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
