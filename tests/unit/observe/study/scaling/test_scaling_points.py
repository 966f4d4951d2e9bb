"""What is read of the runs of a study, and how points travel through a file."""

import json

import pytest
import yaml
from scaling_samples import whole_study

from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import FactorCapacityConfig
from moe_train.errors import DataError
from moe_train.models.counts import count
from moe_train.observe.study.scaling.points import read_point
from moe_train.observe.study.scaling.table import from_csv, read_points, to_csv

STEPS, VOCABULARY, LENGTH = 80, 257, 32
SPARSE = FFNConfig(num_experts=16, top_k=4, expert_dim=16, hidden_dim=64)
DENSE = FFNConfig(hidden_dim=64)


def write_run(folder, name="run", ffn=SPARSE, final=STEPS, model=None, seed=3):
    """A run that drops much in its first three quarters, and 10 and 20 % in the two layers of its last one."""
    model = model or ModelConfig(dim=32, layers=2, heads=2, ffn=ffn)
    total = count(model, VOCABULARY, LENGTH).total
    records = [{"kind": "event", "step": 0, "event": "started", "parameters": total}]
    for step in (20, 60, 80):
        record = {"kind": "train", "step": step, "loss": 6.0, "tokens": 512 * step}
        for layer in (0, 1) if ffn.num_experts else ():
            record[f"moe/layer_0{layer}/load"] = [1 / 16] * 16
            record[f"moe/layer_0{layer}/dropped_fraction"] = 0.1 * (layer + 1) if step == 80 else 0.9
        records.append(record)
    if final:
        records.append({"kind": "eval", "step": final, "loss": 2.5})
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stated = {"run": {"name": name, "seed": seed}, "train": {"steps": STEPS}, "data": {"seq_len": LENGTH}}
    (folder / name / "config.yaml").write_text(yaml.safe_dump({**stated, "model": model.model_dump(mode="json")}))
    return folder / name


def test_a_run_becomes_a_point(tmp_path):
    limited = SPARSE.model_copy(update={"capacity": FactorCapacityConfig(factor=1.5)})
    point = read_point(write_run(tmp_path, ffn=limited))
    # Per layer two norms of 32, attention of 4 · 32², three matrices of 32 x 16 for each of 4 of 16 experts.
    used, stored = (2 * (2 * 32 + 4 * 32**2 + experts * 3 * 32 * 16) for experts in (4, 16))
    assert (point.active_parameters, point.total_parameters) == (used, stored)
    assert (point.experts, point.top_k, point.expansion, point.granularity) == (16, 4, 4.0, 4)
    assert (point.tokens, point.seq_len, point.seed, point.loss) == (512 * STEPS, LENGTH, 3, 2.5)
    assert point.router_flops == 6 * 2 * 32 * 16 and point.capacity_factor == 1.5
    assert point.dropped_fraction == pytest.approx(0.15)
    assert point.training_flops == pytest.approx(point.flops_per_token * 512 * STEPS)


def test_the_flops_are_those_of_the_counts(tmp_path):
    point = read_point(write_run(tmp_path))
    model = ModelConfig(dim=32, layers=2, heads=2, ffn=SPARSE)
    assert point.flops_per_token == count(model, VOCABULARY, LENGTH).training_flops_per_token


def test_a_dense_run_has_no_experts_no_drops_and_as_many_active_parameters(tmp_path):
    dense, sparse = (read_point(write_run(tmp_path, name, ffn)) for name, ffn in (("a", DENSE), ("b", SPARSE)))
    assert (dense.experts, dense.top_k, dense.expansion, dense.granularity, dense.router_flops) == (0, 0, 1.0, 1, 0.0)
    assert dense.dropped_fraction is None and dense.capacity_factor is None
    assert dense.active_parameters == dense.total_parameters == sparse.active_parameters


def test_unfinished_runs_and_other_kinds_of_model_are_left_out_and_named(tmp_path):
    write_run(tmp_path, "whole")
    write_run(tmp_path, "half", final=40)
    write_run(tmp_path, "unevaluated", final=None)
    write_run(tmp_path, "deep", model=ModelConfig(dim=32, layers=2, heads=2, depth=MixtureOfDepthsConfig()))
    (tmp_path / "report").mkdir()
    points, others = read_points(tmp_path)
    assert [point.name for point in points] == ["whole"]
    assert [folder.name for folder in others] == ["deep", "half", "unevaluated"]


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    write_run(tmp_path, "half", final=40)
    with pytest.raises(DataError, match=r"holds no finished run \(1 unfinished\)"):
        read_points(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_points(tmp_path / "none")


def test_points_come_back_from_their_file(tmp_path):
    points = sorted(whole_study(), key=lambda point: point.name)
    (tmp_path / "points.csv").write_text(to_csv(points))
    assert read_points(tmp_path / "points.csv") == (points, ())


def test_every_wrong_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "points.csv"
    lines = to_csv(whole_study()[:4]).splitlines()
    lines[1] = lines[1].replace(",", ",many", 1)
    lines[3] = ""
    lines[4] = lines[4].rpartition(",")[0].rpartition(",")[0] + ",much,"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        from_csv(path)
    assert "points.csv:2: is no point: seed" in str(caught.value) and "loss" in str(caught.value)
    assert len(caught.value.problems) == 2
