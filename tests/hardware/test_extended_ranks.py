"""Two ranks go on from a checkpoint with other flags: a longer stage, other parameters that train, a wider dtype."""

import pytest

from helpers import runs
from helpers.launching import launch

pytestmark = pytest.mark.slow

# 2 steps of warm-up; the cooldown after step 4 of 6, and after step 8 of 12
OPTIONS = dict(
    seq_length=32, batch_size=1, max_steps=6, warmup_ratio=0.34, decay_ratio=0.34, skip_stage2=True, save_interval=3,
    dtype="bfloat16", optimizer="adamw", keep_checkpoints=9,
)  # fmt: skip


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_that_are_extended_or_changed_by_force(parallel, tiny_teacher, sources, tmp_path):
    """Extended: as planned so, to the bit. In float32 and without the MLPs by force: as one rank with their batch."""

    def go(ranks, output, **changes):
        return launch(ranks, runs.flags(tiny_teacher, sources, tmp_path / output, **{**OPTIONS, **changes}))

    go(2, "run", parallel=parallel)
    runs.copy_up_to(tmp_path / "run", "checkpoint-3", tmp_path / "alone")
    runs.copy_up_to(tmp_path / "run", "checkpoint-3", tmp_path / "changed")
    assert "stable-stage1" in go(2, "run", parallel=parallel, max_steps=12)
    go(2, "planned", parallel=parallel, max_steps=12, warmup_ratio=0.17)
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "planned")
    one, other = (runs.weights(tmp_path / name / "final") for name in ("run", "planned"))
    assert all(one[name].equal(other[name]) for name in one)

    changes = dict(dtype="float32", freeze_mlp=True, max_lr="2e-3", resume_force=True)
    go(2, "changed", parallel=parallel, **changes)
    go(0, "alone", batch_size=2, **changes)
    before = runs.weights(tmp_path / "run" / "checkpoint-3")
    one, other = (runs.weights(tmp_path / name / "final") for name in ("changed", "alone"))
    for name, weight in one.items():
        assert (weight - other[name]).norm() <= 2e-5 * weight.norm(), name
        start = before[name].float()
        rounded = ((weight - start).abs() <= 2**-8 * start.abs()).all()  # what is frozen takes its exact master
        assert rounded if ".mlp." in name else not weight.equal(start), name
