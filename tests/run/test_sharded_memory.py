"""What ranks hold while a sharded pair is loaded, measured: resident memory of real processes under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from checkpoints.run_state import read_trainer_state
from conftest import ROOT, tiny_llama_config
from hardware.devices import default_dtype

RANKS = 4


def start(teacher, student, way, ranks=RANKS):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = str(ROOT / "tests" / "helpers" / "sharded_start.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, script, str(teacher), str(student), way], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_no_rank_holds_a_model(tmp_path):
    """A teacher of 300 MB and its student: a quarter of each on 4 ranks, and a layer at a time beside it."""
    config = tiny_llama_config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip
    with default_dtype(torch.bfloat16):
        LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="100MB")
    found = start(tmp_path, "from_teacher", "fsdp")
    both = found["teacher"] + found["student"]
    assert found["teacher"] > 250e6 and found["student"] > 250e6
    for rank in found["ranks"]:
        assert both / RANKS * 0.9 < rank["after"] < 0.55 * both  # with libraries that are loaded on the way
        assert rank["peak"] < 0.7 * both  # with everything whole it was 1.1


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_of_a_trainer_state_only_the_rows_that_are_used_are_read(tmp_path):
    rows = torch.arange(1 << 25, dtype=torch.int32).view(1 << 10, -1)  # 128 MiB
    torch.save({"optimizer": {"state": {0: {"m": rows}}}}, tmp_path / "trainer_state.pt")
    expected = rows[256:288].clone()
    del rows
    before = resident()
    state = read_trainer_state(tmp_path)
    own = state["optimizer"]["state"][0]["m"][256:288].clone()
    assert torch.equal(own, expected)
    assert resident() - before < 32 << 20
