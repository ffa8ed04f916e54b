"""What looks like a secret never reaches a log, a checkpoint or a tracker."""

import logging
import sys
from pathlib import Path

import pytest

from utils import MaskingFilter, mask_secrets

HUB_TOKEN = "hf_" + "aB3" * 11
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "text",
    [
        HUB_TOKEN,
        WANDB_KEY,
        "wandb_v1_" + "xY1" * 12,
        "sk-" + "a1B2" * 6,
        "ghp_" + "a1B2" * 9,
        "https://user:pa55word@host/data",
        "https://:pa55word@host",
        "https://host/?token=abcdefgh&x=1",
        "Authorization: Bearer abc.def.ghi",
        "HF_TOKEN=abcdefgh123",
        'api_key: "abcdefgh"',
    ],
)
def test_what_looks_like_a_secret_is_masked(text):
    for masked in (mask_secrets(f"before {text} after"), mask_secrets({"notes": [f"before {text}"]})["notes"][0]):
        assert "***" in masked
        assert masked.startswith("before ")
        for secret in ("aB3aB3", "0123456789abcdef", "xY1xY1", "a1B2a1B2", "pa55word", "abcdefgh", "abc.def"):
            assert secret not in masked


def test_names_decide_too():
    flags = {
        "hub_token": "short",
        "API-KEY": "x",
        "password": "",
        "nested": {"client_secret": ["a", "b"]},
        "second_dataset_tokens": 200_000_000,
        "matrix_tokens": 0,
        "tokenizer": "some/name",
        "wandb_project": "llamba-distill",
        "dataset_revision": WANDB_KEY,
        "layers": [10, 14],
        "max_lr": 1e-5,
        "output_dir": Path("a/b"),
        "none": None,
    }
    assert mask_secrets(flags) == {
        **flags,
        "hub_token": "***",
        "API-KEY": "***",
        "nested": {"client_secret": ["***", "***"]},
        "output_dir": "a/b",
    }
    assert flags["hub_token"] == "short"  # a copy


def test_ordinary_text_stays():
    line = "stage1 step 12: loss 1.25, 4096 tokens, key frame 3, https://host:8080/x, token count: 5"
    assert mask_secrets(line) == line


def test_secrets_of_the_environment_are_masked_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "plain-looking")
    assert mask_secrets("error at plain-looking/x") == "error at ***/x"


def test_log_lines_and_tracebacks_are_masked(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(MaskingFilter())
    logger = logging.getLogger("masking")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        raise ValueError(f"bad token {HUB_TOKEN}")
    except ValueError:
        logger.exception("failed with %s", HUB_TOKEN)
    logger.warning("100%% of %s", HUB_TOKEN)
    logged = capsys.readouterr().err
    assert HUB_TOKEN not in logged
    assert "failed with ***" in logged
    assert "ValueError: bad token ***" in logged
    assert "100% of ***" in logged
    record = logging.LogRecord("masking", logging.WARNING, __file__, 1, "two %s of %d", ("a",), None)
    assert MaskingFilter().filter(record)  # a line with a mistake in it is logging's to report, not the run's end
