"""The straight line of a step: 8 frames in 8 files from the command to the products of the experts."""

import sys
from pathlib import Path

import pytest

import moe_train.moe.experts as experts_room
from moe_train import train

PACKAGE = Path(train.__file__).parent
LINE = [
    "train.py", "training/loop.py", "training/step.py", "models/transformer.py", "models/blocks.py", "moe/layer.py",
    "moe/experts.py", "ops/expert_ffn",
]  # fmt: skip


class ArrivedError(Exception):
    """Raised in the place of the experts' products."""


def test_from_command_to_the_product_of_groups_are_8_frames(tmp_path, monkeypatch):
    def stand_in(*_):
        raise ArrivedError

    text = "\n\n".join(
        f"Paragraph {i} of a small text, long enough to be split into documents." * 40 for i in range(60)
    )
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(experts_room, "expert_ffn", stand_in)
    small = ["data=text", f"data.path={tmp_path}/text.txt", f"data.cache_dir={tmp_path}/cache", "tokenizer=bytes",
             "data.seq_len=16", "model.dim=16", "model.heads=2", "model.attention.kv_heads=2",
             f"run.dir={tmp_path}/run", "log.wandb.mode=disabled"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train", *small])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ArrivedError) as caught:
        train.main()
    frames = [Path(entry.path) for entry in caught.traceback]
    ours = [str(path.relative_to(PACKAGE)) for path in frames if path.is_relative_to(PACKAGE)]
    below_the_door = [name for name in ours if not name.startswith("config/")]
    assert [*below_the_door, "ops/expert_ffn"] == LINE
