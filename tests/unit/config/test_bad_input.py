"""What users get wrong: each mistake gives a problem with its key, what stood there, the rule and the remedy."""

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError, Problem

MISTAKES = {
    # unknown keys and groups
    "typo in a key": ("model.ffn.topk=2", "model.ffn.topk", "did you mean model.ffn.top_k?"),
    "typo in a section": ("trian.steps=2", "trian.steps", "did you mean train.steps?"),
    "typo in a group": ("modle=sparse_tiny", "modle", "did you mean model?"),
    "key without its section": ("seed=5", "seed", "did you mean run.seed?"),
    "unknown key with a plus": ("+typo=1", "typo", "is not a key of the configuration"),
    "typo in a preset": ("model=sparse_tny", "model", "(did you mean sparse_tiny?)"),
    "preset of another name": ("model=nope", "model", "choose one of deepseek_moe_16b, deepseek_tiny, deepseek_v2"),
    "typo in a nested group": ("model/ffn/router=tpk", "model/ffn/router", "(did you mean topk?)"),
    "typo in a list of options": ("model/ffn/balance=[aux,zloss]", "model/ffn/balance", "(did you mean z_loss?)"),
    "unknown option in a list": ("model/ffn/balance=[nope]", "model/ffn/balance", "as model/ffn/balance=[A,B]"),
    "list where one is chosen": ("model/ffn/router=[topk,switch]", "model/ffn/router", "takes one option, not a list"),
    "list of one where one is chosen": ("model=[sparse_tiny]", "model", "takes one option, not a list"),
    "no option": ("model/ffn/balance=null", "model/ffn/balance", "must be a string or a list"),
    "unknown experiment": ("experiment=nope", "experiment", "Could not find 'experiment/nope'"),
    # unknown values, wrong types
    "unknown kind of router": ("model.ffn.router.kind=magic", "model.ffn.router.kind", "must be one of 'topk'"),
    "typo in a kind": ("model.ffn.capacity.kind=facter", "model.ffn.capacity.kind", "did you mean factor?"),
    "unknown precision": ("train.precision=fp16", "train.precision", "must be one of 'bf16', 'fp32' or 'fp64'"),
    "word for a number": ("train.steps=ten", "train.steps", "should be a valid integer"),
    "fraction of a step": ("train.steps=1.5", "train.steps", "should be a valid integer"),
    "value for a balance loss": ("model.ffn.balance.aux=0.01", "model.ffn.balance.aux", "is a section, not a value"),
    "truth for a number": ("train.steps=True", "train.steps", "should be a valid integer"),
    "null for a number": ("train.steps=null", "train.steps", "should be a valid integer"),
    "word for a truth": ("model.tie_embeddings=maybe", "model.tie_embeddings", "should be a valid boolean"),
    "value for a section": ("optim=5", "optim", "is a section, not a value"),
    "one beta": ("optim.betas=[0.9]", "optim.betas.1", "is required"),
    # out of bounds
    "no steps": ("train.steps=0", "train.steps", "should be greater than 0"),
    "negative rate": ("optim.lr=-1", "optim.lr", "should be greater than 0"),
    "undefined rate": ("optim.lr=nan", "optim.lr", "should be a finite number"),
    "beta of one": ("optim.betas=[0.9,1.0]", "optim.betas.1", "should be less than 1"),
    "everything held out": ("data.heldout_fraction=1", "data.heldout_fraction", "should be less than 1"),
    "negative seed": ("run.seed=-1", "run.seed", "should be greater than or equal to 0"),
    "tiny vocabulary": ("tokenizer.vocab_size=100", "tokenizer.vocab_size", "greater than or equal to 258"),
    # of another kind
    "field of another kind": ("model.ffn.capacity.factor=2", "model.ffn.capacity.factor", "does not apply to kind="),
    # impossible together
    "odd head width": ("model.dim=24", "model.heads", "rotary positions need an even head width, not 3"),
    "heads do not divide": ("model.dim=100", "model.heads", "must divide model.dim=100"),
    "key heads do not divide": ("model.attention.kv_heads=3", "model.attention.kv_heads", "must divide model.heads=8"),
    "more choices than experts": ("model.ffn.top_k=9", "model.ffn.top_k", "must not exceed model.ffn.num_experts=8"),
    "no MoE layer": ("model.ffn.every=5", "model.ffn.every", "leaves no MoE layer among model.layers=4"),
    "top-1 normalised": ("model.ffn.top_k=1", "model.ffn.router.normalize", "the router gets no gradient"),
    "ranks that ep does not divide": ("parallel.ep=2", "parallel.ep", "must divide the number of ranks, 1"),
    "micro batch that does not divide": ("train.micro_batch=5", "train.micro_batch", "must divide train.global_batch"),
    "longer warm-up than training": ("train.steps=5", "optim.warmup_steps", "must not exceed train.steps=5"),
    # names and files
    "slash in the run's name": ("run.name=a/b", "run.name", "without slashes"),
    "dots for the run's name": ("run.name=..", "run.name", "without slashes"),
    "no name": ("run.name=", "run.name", "1 to 100 printable characters"),
    "text without a path": ("data=text", "data.path", "is required for data.source=text"),
    "data set without a name": ("data=huggingface", "data.path", "is required for data.source=huggingface"),
    "path that nothing reads": ("data.path=my.txt", "data.path", "is not read by data.source=shakespeare"),
    "path that no part reads": ("data.parts={a:{source:imdb,path:t}}", "data.parts.a.path", "is not read by"),
    "parts of no mix": ("data.parts={a:{source:imdb}}", "data.parts", "are not read by data.source=shakespeare"),
    "tokenizer file that nothing reads": (
        "tokenizer.path=t.json",
        "tokenizer.path",
        "is not read by tokenizer.kind=bpe",
    ),
    "tokenizer without a file": ("tokenizer=file", "tokenizer.path", "is required for tokenizer.kind=file"),
    "mix without parts": ("data.source=mix", "data.parts", "a mix needs at least one part"),
    # syntax
    "sweep without -m": ("train.steps=1,2", "train.steps", "Ambiguous value"),
    "list without brackets": ("model/ffn/balance=aux,z_loss", "model/ffn/balance", "write a list as KEY=[A,B]"),
    "several of one": ("model/ffn/router=topk,hash", "model/ffn/router", "add -m for one run per value"),
    "open bracket": ("optim.betas=[0.9", "optim.betas", "quote values with special characters"),
    "key without a value": ("train.steps", "train.steps", "write it as KEY=VALUE"),
    "value without a key": ("=5", "", "write it as KEY=VALUE"),
    "nothing at all": ("", "", "write it as KEY=VALUE"),
    "unknown interpolation": ("run.dir=${nope}", "command line", "Interpolation key 'nope' not found"),
}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def problems_of(*overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as error:
        compose_config("train", TrainConfig, train_problems, list(overrides))
    return error.value.problems


@pytest.mark.parametrize(("override", "key", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_one_mistake(override: str, key: str, message: str) -> None:
    problems = problems_of(override)
    found = [problem for problem in problems if problem.key == key]
    assert found, f"no problem for {key}: {[str(problem) for problem in problems]}"
    assert message in str(found[0])
    assert found[0].remedy
    assert "\n" not in str(found[0])


def test_all_mistakes_at_once() -> None:
    problems = problems_of(
        "train.global_batch=0", "model.ffn.topk=2", "model.heads=7", "model/ffn/router=tpk", "run.name=a/b",
        "optim.betas=[0.9", "data=text", "model/ffn/capacity=[pad]", "model/ffn/balance=[aux,zloss]",
    )  # fmt: skip
    expected = {"model/ffn/capacity", "model/ffn/balance",
                "train.global_batch", "model.ffn.topk", "model.heads", "model.attention.kv_heads", "model/ffn/router",
                "run.name", "optim.betas", "data.path"}  # fmt: skip
    assert {problem.key for problem in problems} == expected
    assert len(problems) == len(expected), "each once"


@pytest.mark.parametrize(
    ("world_size", "overrides", "key", "message"),
    [
        (4, ["parallel.ep=3"], "parallel.ep", "must divide the number of ranks, 4"),
        (4, ["parallel.ep=4", "model.ffn.num_experts=6"], "parallel.ep", "must divide model.ffn.num_experts=6"),
        (4, ["parallel.ep=2", "model=dense_tiny"], "parallel.ep", "a dense model has no experts to shard"),
        (3, [], "train.global_batch", "must be a multiple of the 3 ranks"),
        (4, ["train.micro_batch=3"], "train.micro_batch", "micro_batch x ranks = 3 x 4"),
    ],
)
def test_layouts_that_do_not_fit_the_ranks(
    world_size: int, overrides: list[str], key: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    found = [str(problem) for problem in problems_of(*overrides) if problem.key == key]
    assert any(message in line for line in found), found


def test_a_field_of_the_kind_that_was_just_replaced() -> None:
    """The factor is the user's own, not a leftover of the preset: it must not be dropped in silence."""
    problems = problems_of("model=switch_tiny", "model.ffn.capacity.kind=dropless", "model.ffn.capacity.factor=2.0")
    assert [str(p) for p in problems] == [
        "model.ffn.capacity.factor=2.0: does not apply to kind=dropless; choose the kind that has it, or leave it out"
    ]


def test_a_field_of_a_router_that_was_just_replaced() -> None:
    problems = problems_of("model/ffn/router=noisy_topk", "model.ffn.router.normalize=none")
    assert [problem.key for problem in problems] == ["model.ffn.router.normalize"]
    assert "does not apply to kind=noisy_topk" in str(problems[0])


def test_a_choice_that_the_preset_does_not_have() -> None:
    problems = problems_of("model=dense_tiny", "model/ffn/balance=[aux]")
    assert [str(problem) for problem in problems] == [
        "model/ffn/balance: the chosen preset has no such choice; choose another, or write +model/ffn/balance=..."
    ]


def test_a_sweep_over_a_group_of_single_options_is_not_told_to_write_a_list() -> None:
    assert "[A,B]" not in str(problems_of("model/ffn/router=topk,hash")[0])


def test_a_message_holds_no_trace_of_hydra() -> None:
    assert str(problems_of("model=sparse_tny")[0]).startswith("model=sparse_tny: Could not find 'model/sparse_tny'; ")


def test_other_readings_of_bytes() -> None:
    problems = problems_of("tokenizer=bytes", "tokenizer.lowercase=true", "tokenizer.prefix_space=true")
    assert [problem.key for problem in problems] == ["tokenizer.lowercase", "tokenizer.prefix_space"]
    assert all("kind=bytes reads text as it is" in problem.rule for problem in problems)
