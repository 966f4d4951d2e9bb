"""What a model returns when it is given targets: the losses of its logits, in chunks or whole, and their gradients."""

import pytest
import torch
from layouts import VOCAB, Case
from torch import Tensor

from moe_train.models.transformer import ModelLosses, Transformer
from moe_train.ops.loss import IGNORE, cross_entropy_sum

KINDS = {
    "tied": (),
    "untied, with a bias": ("model.tie_embeddings=false", "model.head_bias=true"),
    "modules ahead": ("model.mtp.depth=2",),
}


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))


def targets(model: Transformer) -> list[Tensor]:
    labels_BS = tokens().roll(-1, dims=1)
    labels_BS[:, -1] = IGNORE
    return [labels_BS.roll(-k, dims=1) for k in range(1 + model.config.mtp.depth)]


def gradients(model: Transformer, sums: list[Tensor]) -> list[Tensor]:
    total = torch.stack([(k + 1) * loss for k, loss in enumerate(sums)]).sum() / 24
    return list(torch.autograd.grad(total, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("chunk", [None, 5, 24, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_logits(kind: str, chunk: int | None) -> None:
    model = Case(kind, KINDS[kind]).whole_model()
    output, labels = model(tokens()), targets(model)
    logits = [output.logits_BSV, *output.mtp_logits]
    pairs = zip(logits, labels, strict=True)
    expected = [cross_entropy_sum(logits_BSV.flatten(0, 1), labels_BS.flatten()) for logits_BSV, labels_BS in pairs]
    model.loss_chunk = chunk
    losses: ModelLosses = model(tokens(), None, labels)
    assert torch.allclose(torch.stack(losses.loss_sums), torch.stack(expected), rtol=1e-12)
    assert len(losses.records) == len(output.records)
    found = gradients(model, list(losses.loss_sums))
    for a, b in zip(found, gradients(model, expected), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    with torch.no_grad():
        alone = model.eval()(tokens(), None, labels[:1]).loss_sums
    assert torch.allclose(torch.stack(alone), expected[0].unsqueeze(0), rtol=1e-12)


def test_without_targets_nothing_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Case("plain").whole_model()
    records = model(tokens()).records
    monkeypatch.setattr(Transformer, "score", None)
    found: ModelLosses = model(tokens(), None, ())
    assert found.loss_sums == ()
    assert torch.equal(found.records[0].counts_E, records[0].counts_E)
