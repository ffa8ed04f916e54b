"""`--kl_weight 0`: a teacher is loaded for what needs one and for nothing else, and the estimate counts it there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from arguments import parse_arguments
from evaluation.diagnostics import layer_figures
from hardware.memory import estimate_memory
from helpers import runs
from helpers.teachers import big_pair
from models import LlambaForCausalLM
from run.acceleration import step_settings
from run.inputs import teacher_need

HARD = {"kl_weight": 0, "ce_weight": 1, "skip_stage2": True, "max_steps": 2, "second_dataset_tokens": None}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tiny_teacher, sources):
    """A student that has had its start from the teacher."""
    folder = tmp_path_factory.mktemp("distilled")
    assert train.main(runs.flags(tiny_teacher, sources, folder, skip_stage2=True, max_steps=1)) == 0
    return folder / "final"


@pytest.fixture
def unreadable(monkeypatch):
    """A teacher whose weights nobody can load while this is on."""

    def refuse(*args, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def hard(teacher, sources, output, student, **changes):
    return train.main(runs.flags(teacher, sources, output, **HARD | {"student_model": student} | changes))


def test_no_teacher_is_loaded_where_nothing_needs_one(distilled, unreadable, tiny_teacher, sources, tmp_path):
    """Diagnostics are on by default: they leave the distance to a teacher out rather than load one."""
    assert hard(tiny_teacher, sources, tmp_path, distilled, diagnostics_interval=1) == 0
    figures = [row for row in runs.metrics(tmp_path) if "layers/grad_norm_0" in row]
    assert len(figures) == 2
    assert all("layers/mean_decay_0" in row and "layers/hidden_distance_0" not in row for row in figures)


@pytest.mark.parametrize(
    "needs",
    [
        {"student_model": "from_teacher"},
        {"eval_dataset": "heldout", "eval_interval": 1, "eval_tokens": 200},
        {"hidden_tokens": 256},
        {"sample_interval": 1},
        {"kl_weight": 1},
    ],
    ids=lambda needs: next(iter(needs)),
)
def test_what_needs_a_teacher_loads_it(needs, distilled, unreadable, tiny_teacher, sources, tmp_path, capsys):
    needs = {name: sources.get(value, value) for name, value in needs.items()}
    assert hard(tiny_teacher, sources, tmp_path, needs.pop("student_model", distilled), **needs) == 2
    assert "teacher weights" in capsys.readouterr().err


def test_a_start_from_the_teacher_lets_it_go(tiny_teacher, sources, tmp_path, monkeypatch):
    """After transfer and calibration nothing holds it; losses are those of a run that keeps it for evaluations."""
    held = []
    original = train.distill

    def watched(args, ranks):
        from run import session

        enter = session.Session.enter
        monkeypatch.setattr(
            session.Session, "enter", lambda self, stage: (held.append(self.models.teacher), enter(self, stage))[1]
        )
        return original(args, ranks)

    monkeypatch.setattr(train, "distill", watched)
    options = {"student_model": "from_teacher", "freeze_mlp": True}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "free", **HARD | options)) == 0
    kept = {**options, "eval_dataset": sources["heldout"], "eval_tokens": 200}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "kept", **HARD | kept)) == 0
    assert held[0] is None and held[1] is not None
    assert runs.losses(tmp_path / "free") == runs.losses(tmp_path / "kept")


def test_the_estimate_counts_the_teacher_where_it_is():
    teacher, student = big_pair()
    weights = {}
    for need in ("never", "at the start", "throughout"):
        args = parse_arguments(["--kl_weight", "0", "--ce_weight", "1", "--device", "cuda:0", "--seq_length", "16"])
        args.no_compile = True
        weights[need] = estimate_memory(teacher, student, step_settings(args), teacher_need=need)
    size = weights["throughout"].parts["teacher weights"]
    assert size == 2 * (2 * 32000 * 1024 + 8 * (1024 * 2560 + 2 * 1024 + 3 * 1024 * 4096) + 1024)
    assert weights["throughout"].allocated - weights["never"].allocated == size
    assert weights["never"].parts["teacher weights"] == weights["at the start"].parts["teacher weights"] == 0
    assert weights["never"].allocated == weights["at the start"].allocated  # a step holds more than both models


def test_where_the_start_holds_most_the_estimate_says_so():
    """Next to nothing trains: gradients and state are less than the teacher that has to be there first."""
    teacher, student = big_pair()
    flags = "--kl_weight 0 --ce_weight 1 --device cuda:0 --seq_length 16 --freeze_mlp --freeze_embeddings".split()
    args = parse_arguments(flags)
    args.no_compile = True
    start, never = (
        estimate_memory(teacher, student, step_settings(args), teacher_need=n) for n in ("at the start", "never")
    )
    assert start.parts["teacher weights"] > 0 and start.allocated > never.allocated
    assert start.parts["student weights"] == 2 * sum(p.numel() for p in LlambaForCausalLM(student).parameters())
    assert "loaded" in start.describe()


def test_the_need_follows_the_flags():
    def need(*flags, names=("stage1",), fresh=False):
        return teacher_need(parse_arguments(["--kl_weight", "0", "--ce_weight", "1", *flags]), names, fresh=fresh)

    assert need() == "never" and need(fresh=True) == "at the start"
    assert need("--kl_weight", "0.1") == "throughout"
    assert need("--eval_dataset", "x") == need("--sample_interval", "5") == "throughout"
    assert need("--hidden_tokens", "9", names=("hidden", "stage1")) == "throughout"
    assert need("--hidden_tokens", "9") == "never"  # a resumed run that has left the stage behind


def test_diagnostics_without_a_teacher(distilled):
    student = LlambaForCausalLM.load(str(distilled), dtype=torch.float32)
    figures = layer_figures(student, None, torch.randint(0, 512, (2, 16)), None)
    assert figures.keys() == {f"layers/mean_decay_{index}" for index in (0, 2, 3)}
