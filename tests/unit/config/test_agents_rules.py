"""What is wrong with a mixture of agents: told at once, all together, and without showing what may be a key."""

import re
import shlex

import pytest
import yaml

from moe_train.config.agents import AgentsConfig, HuggingFaceAgent, OpenAIAgent, RunAgent
from moe_train.config.agents_rules import agents_problems
from moe_train.config.compose import compose_config, unstated
from moe_train.config.groups import config_dir, options_of
from moe_train.config.validate import validate
from moe_train.errors import ConfigError

LOCAL = "mixture.base_url=http://127.0.0.1:1/v1"
KEY = "sk-Abc123-not-to-be-seen"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One process, no key, and runs in the working folder."""
    for name in ("WORLD_SIZE", "SOME_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)


def compose(*overrides):
    """Compose as the command does."""
    return compose_config("agents", AgentsConfig, agents_problems, list(overrides))


def quick(*overrides):
    """Validate a preset with changes, without Hydra, which takes longer than all rules together."""
    changes = dict(override.split("=", 1) for override in overrides)
    preset = changes.pop("mixture", "duo")
    mapping = {"mixture": yaml.safe_load((config_dir() / "mixture" / f"{preset}.yaml").read_text())}
    for key, value in changes.items():
        *path, leaf = key.split(".")
        section = mapping
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = yaml.safe_load(value)
    return validate(mapping, AgentsConfig, agents_problems, frozenset(changes))


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        quick(*overrides)
    return {problem.key: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize("preset", options_of("mixture"))
def test_every_preset_is_a_possible_mixture(preset):
    config = compose(f"mixture={preset}", "prompt=hi")
    names = [*(name for layer in config.mixture.layers for name in layer), config.mixture.aggregator]
    assert set(names) == set(config.mixture.agents), "no agent is idle"
    title = (config_dir() / "mixture" / f"{preset}.yaml").read_text().splitlines()[0]
    assert f" {len(names)} calls." in title


def test_the_mixture_of_the_paper():
    """Six proposers, three layers of which the last is the aggregator (arXiv 2406.04692, section 3.1); Lite has two."""
    paper, lite = (quick(f"mixture={name}", "prompt=hi").mixture for name in ("paper", "lite"))
    assert [len(layer) for layer in paper.layers] == [6, 6] and [len(layer) for layer in lite.layers] == [6]
    assert paper.agents == lite.agents
    assert paper.agents[paper.aggregator].model == "Qwen/Qwen1.5-110B-Chat"
    assert lite.agents[lite.aggregator].model == "Qwen/Qwen1.5-72B-Chat"


def test_the_folder_follows_the_name():
    assert compose("prompt=hi", "name=talk").output == "runs/agents/talk"


def test_agents_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("SOME_KEY", "x")
    config = compose(
        "prompt=hi", "mixture.agents.third.kind=openai", "mixture.agents.third.model=m", LOCAL,
        "mixture.agents.third.key_env=SOME_KEY", "mixture.layers=[[first,third],[third,third]]",
        "mixture.agents.second.kind=huggingface", "mixture.agents.second.path=.", "mixture.agents.first.sample.seed=3",
    )  # fmt: skip
    first, second, third = config.mixture.agents.values()
    assert isinstance(first, RunAgent) and first.sample.seed == 3
    assert isinstance(second, HuggingFaceAgent), "the run folder that the preset gave it is gone with its kind"
    assert isinstance(third, OpenAIAgent) and third.key_env == "SOME_KEY"
    assert config.mixture.layers == (("first", "third"), ("third", "third"))


def test_shown_configurations_are_complete():
    shown = unstated("agents", AgentsConfig, ["prompt=hi", "mixture=duo"])
    assert "++mixture.agents.first.sample.top_p=0.95" in shown


def test_all_mistakes_are_told_together():
    found = problems(
        "mixture=lite", "mixture.agents.dbrx.modl=3", "mixture.agents.new.dir=x", "mixture.agents.odd.kind=robot",
        "concurrency=0", "mixture.aggregator=qwen",
    )  # fmt: skip
    assert "did you mean mixture.agents.dbrx.model?" in found["mixture.agents.dbrx.modl"]
    assert "is required" in found["mixture.agents.new.kind"]
    assert "must be one of" in found["mixture.agents.odd.kind"]
    assert "concurrency" in found
    found = problems("mixture.aggregator=frist", "mixture.layers=[[first,x],[y,y]]", "mixture.synthesis=' '")
    assert found.keys() == {
        "prompt", "mixture.aggregator", "mixture.layers[0]", "mixture.layers[1]", "mixture.synthesis",
    }  # fmt: skip
    assert "did you mean first?" in found["mixture.aggregator"]


def test_a_key_of_another_kind():
    assert (
        "does not apply to kind=run"
        in problems("prompt=x", "mixture.agents.first.key_env=A")["mixture.agents.first.key_env"]
    )


@pytest.mark.parametrize("layers", ["[]", "[[]]"])
def test_there_is_a_proposer(layers):
    assert any(key.startswith("mixture.layers") for key in problems("prompt=x", f"mixture.layers={layers}"))


def test_requests(tmp_path):
    assert "is required" in problems()["prompt"]
    assert "is required" in problems("prompt=' '")["prompt"]
    assert "is not a file" in problems("prompt_file=nowhere")["prompt_file"]
    (tmp_path / "request.txt").write_text("hi")
    assert "there is a prompt, too" in problems("prompt=hi", "prompt_file=request.txt")["prompt_file"]
    assert quick("prompt_file=request.txt").prompt is None


def test_runs_and_folders_that_are_not_there(monkeypatch):
    found = problems("prompt=hi", "mixture.agents.first.dir=nowhere", "mixture.agents.second.kind=huggingface",
                     "mixture.agents.second.path=nowhere")  # fmt: skip
    assert "holds no config.yaml" in found["mixture.agents.first.dir"]
    assert "holds no config.json" in found["mixture.agents.second.path"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = problems("prompt=hi", "mixture.agents.second.kind=huggingface", "mixture.agents.second.path=nowhere")
    assert "pip install 'moe_train[hf]'" in found["mixture.agents.second.kind"]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://host:port/v1", "http://host:0/v1",
     "http://[::1/v1", "http://ho st/v1", "http://host/v1?a=b", "http://host/v1#x"],
)  # fmt: skip
def test_what_is_no_address(address):
    found = problems("mixture=single", "prompt=hi", f"mixture.base_url={address}")
    assert "is not the address of an endpoint" in found["mixture.base_url"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000/v1", "https://host/v1/", "http://[::1]:80/v1", "http://h"])
def test_addresses(address):
    assert quick("mixture=single", "prompt=hi", f"mixture.base_url={address}")


def test_an_address_is_needed():
    assert "is required" in problems("mixture=single", "prompt=hi", "mixture.base_url=null")["mixture.base_url"]


def test_the_variable_of_a_key(monkeypatch):
    asked = ["mixture=single", "prompt=hi", "mixture.key_env=SOME_KEY"]
    assert "export SOME_KEY=" in problems(*asked)["mixture.key_env"]
    for bad in ("two words", "zwölf", "a\nb"):
        monkeypatch.setenv("SOME_KEY", bad)
        told = problems(*asked)["mixture.key_env"]
        assert "characters that no key has" in told and bad not in told
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    assert KEY not in str(quick(*asked))


@pytest.mark.parametrize(
    "override",
    [f"mixture.key_env={KEY}", f"mixture.agents.model.key_env={KEY}", f"mixture.agents.model.api_key={KEY}",
     f"mixture.agents.model.token={KEY}", f"mixture.base_url=http://me:{KEY}@host/v1"],
)  # fmt: skip
def test_a_key_in_the_configuration_is_refused_and_not_shown(override):
    found = problems("mixture=single", "prompt=hi", override)
    assert override.partition("=")[0] in found and KEY not in str(found)


def test_scoring_needs_runs():
    for mode in ("perplexity", "vote"):
        found = problems(f"mode={mode}", "mixture=single", "score.heldout_of=x")
        assert found.keys() == {"mixture.agents.model.kind", "score.heldout_of"}
        assert quick(f"mode={mode}").prompt is None


def test_places(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "is a file" in problems("prompt=hi", "output=taken/below")["output"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in problems("prompt=hi")["WORLD_SIZE"]


def test_the_commands_of_the_page_are_commands():
    page = (config_dir().parent / "docs" / "agents.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line.partition("moe_train.agents")[2]) for line in blocks.splitlines()]
    assert len(commands) >= 5
    for arguments in commands:
        assert compose_config("agents", AgentsConfig, lambda config: [], arguments)
    listed = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", page, re.MULTILINE)
    assert sorted(name for name, _ in listed) == options_of("mixture")
    for name, calls in listed:
        assert sum(map(len, quick(f"mixture={name}", "prompt=x").mixture.layers)) + 1 == int(calls)
