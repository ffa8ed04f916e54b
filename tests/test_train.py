"""The main job in real processes: both stages, what they leave behind, and going on from it."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

import train
from checkpoints.files import damage
from conftest import ROOT
from helpers import runs
from helpers.durations import cpu_seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher, sources, run_script):
    """A finished run in a folder with a hyphen, started from another directory."""
    folder = tmp_path_factory.mktemp("a-run")
    options = dict(eval_dataset=sources["heldout"], eval_interval=6, eval_tokens=512, freeze_mlp=True)
    argv = runs.flags(tiny_teacher, sources, folder / "out", **options)
    done = run_script("train.py", *argv, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out", done


def test_both_stages_leave_a_whole_run(finished):
    output, done = finished
    rows = runs.metrics(output)
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["stage"] for row in steps] == ["stage1"] * 8 + ["stage2"] * 4
    assert steps[-1]["train/tokens"] == 12 * 2 * 64
    for name in ("kl", "top1_agreement", "lr", "grad_norm", "tokens_per_second"):
        assert f"train/{name}" in steps[0]
    assert steps[0]["train/lr"] == 1e-3 and steps[7]["train/lr"] == pytest.approx(1e-5)
    assert (output / "loss.png").stat().st_size > 1000
    assert {"checkpoint-8", "checkpoint-12", "final"} <= {path.name for path in output.iterdir()}
    assert "\r" not in done.stdout and "ETA" in done.stdout


def test_held_out_kl_falls(finished):
    held_out = [row["eval/kl"] for row in runs.metrics(finished[0]) if "eval/kl" in row]
    assert len(held_out) == 4 and held_out[-1] < held_out[0]


def test_the_final_model_loads_without_this_repository(finished, tmp_path):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]; tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "prompt = tokenizer('import os', return_tensors='pt')\n"
        "print(model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1])\n"
        "assert 'models' not in sys.modules"
    )
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished[0] / "final")],
        capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 5


def test_a_finished_run_says_so(finished, tiny_teacher, sources, caplog):
    output, _ = finished
    options = dict(eval_dataset=sources["heldout"], eval_interval=6, eval_tokens=512, freeze_mlp=True)
    before = (output / "metrics.jsonl").read_text()
    assert train.main(runs.flags(tiny_teacher, sources, output, **options)) == 0
    assert (output / "metrics.jsonl").read_text() == before


def test_a_new_run_continues_from_a_checkpoint(finished, tiny_teacher, sources, tmp_path):
    """`--student_model <checkpoint>` keeps its trained weights and its layers: nothing is transferred again."""
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "more", student_model=finished[0] / "final", max_steps=1,
        max_lr="1e-12", min_lr="1e-12", weight_decay=0, skip_stage2=True,
    )  # fmt: skip
    assert train.main(argv) == 0
    before = runs.weights(finished[0] / "final")
    after = runs.weights(tmp_path / "more" / "final")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_low_precision_runs(tiny_teacher, sources, tmp_path, dtype, accumulation):
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", dtype=dtype, max_steps=3, skip_stage2=True,
        optimizer="adamw" if dtype == "float16" else "adamw8bit", grad_accumulation_steps=accumulation,
    )  # fmt: skip
    assert train.main(argv) == 0
    values = [loss for _, loss, _ in runs.losses(tmp_path / "run")]
    assert len(values) == 3 and all(5 < value < 8 for value in values)
    tensors = runs.weights(tmp_path / "run" / "final")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}


def test_hard_labels_alone_and_document_reset(tiny_teacher, sources, tmp_path):
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", kl_weight=0, ce_weight=1, document_reset=True, max_steps=2,
        skip_stage2=True,
    )  # fmt: skip
    assert train.main(argv) == 0
    rows = [row for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    assert all(row["train/loss"] == pytest.approx(row["train/ce"], rel=1e-6) for row in rows)


def test_epochs_end_with_the_text(tiny_teacher, sources, tmp_path):
    from data import SourceSpec, build_loader
    from model_utils import get_tokenizer

    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", epochs=1, seq_length=512, batch_size=8, skip_stage2=True,
        log_interval=100, max_steps=1,
    )  # fmt: skip
    assert train.main(argv) == 0
    spec = SourceSpec(name=str(sources["train"]), shuffle_buffer=16)
    loader = build_loader(spec, get_tokenizer(str(tiny_teacher)), seq_length=512, batch_size=8, epochs=1)
    steps = sum(1 for _ in loader)
    assert runs.metrics(tmp_path / "run")[-1]["step"] == steps > 1


def test_help_is_quick(run_script):
    begun = cpu_seconds()
    done = run_script("train.py", "--help", fresh=True)
    assert done.returncode == 0 and "--teacher_model" in done.stdout
    assert cpu_seconds() - begun < 1.0


OUT_OF_MEMORY = """
import resource, sys
import train
if sys.argv[1] == "cpu":
    import pyarrow, run.stages, transformers.models.llama.modeling_llama  # libraries first: the limit is for the rest
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
else:
    import torch
    torch.cuda.set_per_process_memory_fraction((1 << 28) / torch.cuda.get_device_properties(0).total_memory)
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_out_of_memory_is_advice_and_exit_3(tiny_teacher, sources, tmp_path, device):
    """The same run first without, then with a limit on its memory; what the first one saved stays as it is."""
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", device=device, seq_length=1024, batch_size=24, max_steps=50,
        save_interval=1, no_compile=True, gradient_checkpointing="none", skip_stage2=True,
    )  # fmt: skip
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.DEVNULL, env=env)
    while not list((tmp_path / "run").glob("checkpoint-*")) and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait()
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert saved
    command = [sys.executable, "-c", OUT_OF_MEMORY, device, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 3, done.stdout[-1500:] + done.stderr[-1500:]
    lines = [line for line in done.stdout.splitlines() if "out of memory" in line]
    assert len(lines) == 1 and f"on {device}; a step needs about" in lines[0] and "activations" in lines[0]
    flags = re.findall(r"(--\w+)[^;]*\(about ([\d.]+) GiB\)", lines[0])
    assert {"--batch_size", "--gradient_checkpointing"} <= {flag for flag, _ in flags}
    assert [float(gain) for _, gain in flags] == sorted((float(gain) for _, gain in flags), reverse=True)
    assert sorted((tmp_path / "run").glob("checkpoint-*")) == saved
    assert all(damage(folder) is None for folder in saved)
