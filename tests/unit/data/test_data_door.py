import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.label_rules import LABELS_ONLY
from moe_train.config.schema import PrepareConfig
from moe_train.prepare import rules

ROOT = Path(__file__).parents[3]


def run_prepare(*arguments):
    command = [sys.executable, "-m", "moe_train.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "100"})


def test_prepare_prints_a_summary(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {number:04d} of text.\n\n" for number in range(100)))
    settings = ["data=text", f"data.path={tmp_path}", "tokenizer=bytes", f"data.cache_dir={tmp_path / 'cache'}"]
    done = run_prepare(*settings, f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "heldout" in done.stdout and str(tmp_path / "out") in done.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_mistakes_end_with_status_2_and_no_traceback(tmp_path):
    done = run_prepare("data=text", f"data.path={tmp_path / 'none'}", f"data.cache_dir={tmp_path}")
    assert done.returncode == 2
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", sorted(path.stem for path in (ROOT / "configs/data").glob("*.yaml")))
def test_every_source_composes(option):
    needs_path = option in ("text", "labelled", "huggingface", "tokens")
    overrides = [f"data={option}", *(["data.path=somewhere"] if needs_path else [])]
    asked = (lambda config: []) if option in LABELS_ONLY else rules
    config = compose_config("prepare", PrepareConfig, asked, overrides)
    assert config.data.source == ("text" if option == "labelled" else option)
    assert (option == "mix") == bool(config.data.parts)


@pytest.mark.parametrize("option", sorted(path.stem for path in (ROOT / "configs/tokenizer").glob("*.yaml")))
def test_every_tokenizer_composes(option):
    overrides = [f"tokenizer={option}", *(["tokenizer.path=t.json"] if option == "file" else [])]
    assert compose_config("prepare", PrepareConfig, rules, overrides).tokenizer.kind == option
