import pytest

from moe_train.observe.redact import MASK, redact, redact_all, redact_command

SECRET = "s3cr3t-value-9876"


@pytest.mark.parametrize(
    "text",
    [
        f"api_key={SECRET}",
        f"--wandb-api-key={SECRET}",
        f"HF_TOKEN={SECRET} python train.py",
        f"--token={SECRET}",
        f"db.password: {SECRET}",
        f"https://user:{SECRET}@host/repo.git",
        f"s3://{SECRET}@bucket/x",
    ],
)
def test_secrets_are_masked(text):
    assert SECRET not in redact(text)
    assert MASK in redact(text)


@pytest.mark.parametrize("token", ["hf_" + "a" * 34, "ghp_" + "A1" * 18, "sk-" + "x" * 40, "AKIA" + "B" * 16])
def test_known_shapes_of_tokens_are_masked(token):
    assert token not in redact(f"got {token} from the shell")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD"])
def test_values_of_secret_variables_are_masked_anywhere(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert redact(f"failed with {SECRET}!") == f"failed with {MASK}!"


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer.boundary_token=<eos>",
        "num_memory_tokens=12",
        "sample.max_tokens=120",
        "model.ffn.top_k=2",
        "no such token: <|endoftext|>",
        "https://host/path",
    ],
)
def test_harmless_text_is_untouched(text):
    assert redact(text) == text


def test_a_secret_after_its_option_is_masked():
    shown = redact_command(["python", "-m", "x", "--token", SECRET, "--wandb-api-key", SECRET, "train.steps=3"])
    assert shown == ["python", "-m", "x", "--token", MASK, "--wandb-api-key", MASK, "train.steps=3"]


def test_nested_values_are_masked_by_name_and_by_content():
    config = {"a": [f"https://u:{SECRET}@h"], "b": {"api_key": SECRET, "boundary_token": "<eos>", "n": 3}, "c": None}
    shown = redact_all(config)
    assert SECRET not in str(shown)
    assert shown["b"] == {"api_key": MASK, "boundary_token": "<eos>", "n": 3}
    assert shown["c"] is None
