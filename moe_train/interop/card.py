"""The model card: what was trained on what, how well, and how to load it."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.interop.families.base import Family
from moe_train.interop.native import NATIVE
from moe_train.models.counts import count
from moe_train.observe.records import finite, parse_record


def model_card(family: Family, config: TrainConfig, vocab_size: int, step: int, run_dir: Path) -> str:
    """Return README.md.

    Args:
        family: that the folder is written for.
        config: of the training.
        vocab_size: tokens V of the model.
        step: optimizer steps that the weights have seen.
        run_dir: where the run's metrics lie.
    """
    size = count(config.model, vocab_size, config.data.seq_len)
    tokens = step * config.train.global_batch * config.data.seq_len
    loss = heldout_loss(run_dir, step)
    rows = {
        "class": family.class_name,
        "architecture": architecture(config.model),
        "parameters": f"{size.total:,} in all, {size.active:,} active per token",
        "vocabulary": f"{vocab_size:,} tokens",
        "training": f"{step:,} steps of {config.train.global_batch} sequences, {tokens:,} positions",
        "data": source_of(config),
        "sequence length": f"{config.data.seq_len} tokens",
        "held-out loss": "not recorded" if loss is None else f"{loss:.4f} nats per token",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    tags = "library_name: transformers\n" if family is not NATIVE else ""
    return f"""---
{tags}tags: [mixture-of-experts, moe_train]
---

# {config.run.name}

Trained and exported by moe_train.

| | |
|---|---|
{table}

{how_to_load(family)}
"""


def architecture(model: ModelConfig) -> str:
    """Return the model in a few words."""
    ffn = model.ffn
    words = f"{model.layers} layers of width {model.dim}, {model.heads} heads ({model.attention.kind})"
    if isinstance(model.depth, MixtureOfDepthsConfig):
        words += f", 1 in {model.depth.every} of them for {model.depth.capacity:.3g} of the tokens"
    if ffn.num_experts == 0:
        return f"{words}, dense"
    if ffn.graph is not None:
        kind = "whole blocks" if ffn.graph.expert == "block" else "feed-forward networks"
        return f"{words}, {ffn.num_experts} experts ({kind}) that all see every token, {ffn.graph.layers} graph layers"
    shared = f" and {ffn.num_shared_experts} shared" if ffn.num_shared_experts else ""
    return f"{words}, {ffn.num_experts} experts of which {ffn.top_k}{shared} per token ({ffn.router.kind})"


def source_of(config: TrainConfig) -> str:
    """Return where the text came from, without the folders of this machine."""
    data = config.data
    if data.source == "mix":
        return "a mix of " + ", ".join(f"{label} ({part.source})" for label, part in data.parts.items())
    return f"{data.source} ({data.path})" if data.source == "huggingface" and data.path else data.source


def heldout_loss(run_dir: Path, step: int) -> float | None:
    """Return the loss of the last evaluation at a step, in nats per token; None when there was none."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [record for line in lines if (record := parse_record(line)) is not None and record["kind"] == "eval"]
    losses = [finite(record.get("loss")) for record in found if record["step"] == step]
    return losses[-1] if losses else None


def how_to_load(family: Family) -> str:
    """Return the commands, for the one who has the folder."""
    tokenizer = "tokenizer=file tokenizer.path=FOLDER/tokenizer.json"
    ours = f"python -m moe_train.train model=pretrained model.init_from=FOLDER {tokenizer}"
    if family is NATIVE:
        return f"The weights have moe_train's own names. Train them further with it:\n\n```bash\n{ours}\n```"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

```bash
vllm serve FOLDER
python -m sglang.launch_server --model-path FOLDER
{ours}
```"""
