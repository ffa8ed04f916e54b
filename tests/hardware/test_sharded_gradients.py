"""FSDP2 with accumulation: what each rank keeps of the gradients, in which precision, and what the estimate says.

Collectives of a "fake" group do nothing, but all memory of one rank of many is really taken.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from arguments import parse_arguments
from conftest import tiny_llama_config
from distill.distillation import StudentLoss
from distill.initialization import student_config
from hardware import parallel
from hardware.memory import WORKSPACE, StepModel, estimate_memory
from hardware.meta_models import meta_student, teacher_sizes
from hardware.ranks import Ranks
from loop.forms import Stage
from run.acceleration import step_settings
from run.build import Models
from run.inputs import settle_parallel, whole_models_for
from run.stages import synchronise

SHARDS = 4
CPU = torch.device("cpu")


@pytest.fixture
def many():
    dist.init_process_group("fake", rank=0, world_size=SHARDS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sizes(**changes):
    shape = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=32)
    return tiny_llama_config(**{**shape, "vocab_size": 2048} | changes)


def flags(accumulation):
    args = parse_arguments(["--layers", "1", "--seq_length", "16", "--device", "cuda:0", "--kl_weight", "0"])
    args.no_compile, args.ce_weight, args.grad_accumulation_steps = True, 1.0, accumulation
    return args


def sharded_stage(config, args, *, whole=False):
    """A stage's own way to accumulate, on a bf16 student with random weights."""
    torch.manual_seed(0)
    student = meta_student(config, student_config(config), step_settings(args)).to_empty(device="cpu")
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.02)
    backbone = student.backbone
    backbone.rotary_emb = type(backbone.rotary_emb)(backbone.attention_config)
    step = parallel.shard(StudentLoss(student, None, kl_weight=0.0, ce_weight=1.0), CPU)
    models = Models(None, student, None, CPU, CPU, torch.bfloat16, student_loss=step, whole_gradients=whole)
    stage = Stage("stage1", [], None, step, None, None, 1)
    synchronise(stage, models, "fsdp")
    return stage


def micro_step(stage, last, seed=0):
    tokens = torch.randint(0, 512, (1, 17), generator=torch.Generator().manual_seed(seed))
    stage.synchronise(last)
    valid = torch.ones(1, 16, dtype=torch.bool)
    stage.trainable(tokens[:, :-1], tokens[:, 1:], valid, None, None, torch.tensor(1.0)).loss.backward()


def tracked(stage, accumulation):
    """(bytes held after the window's first micro step, peak of two windows)."""
    tracker, held = MemTracker(), []
    tracker.track_external(stage.trainable)
    with tracker:
        for _ in range(2):
            for index in range(accumulation):
                tracker.reset_mod_stats()
                micro_step(stage, index == accumulation - 1)
                held.append(tracker.get_tracker_snapshot("current")[CPU]["Total"])
            stage.trainable.zero_grad(set_to_none=True)
    return held[0], tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.mark.parametrize("whole", [False, True], ids=["reduced", "whole"])
def test_what_a_micro_step_leaves_behind(whole, many):
    """4 bytes a parameter on each of any number of ranks is what must not be by default."""
    stage = sharded_stage(sizes(), flags(3), whole=whole)
    parameters = sum(p.numel() for p in stage.parameters())
    held, _ = tracked(stage, 3)
    gradients = held - 2 * parameters / SHARDS
    assert gradients == pytest.approx(parameters * (4.0 if whole else 2.0 / SHARDS), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "accumulation, whole", [(1, False), (3, False), (3, True)], ids=["no accumulation", "reduced", "whole"]
)
def test_the_estimate_is_the_measured_peak(accumulation, whole, many):
    config, args = sizes(), flags(accumulation)
    _, peak = tracked(sharded_stage(config, args, whole=whole), accumulation)
    model = StepModel(
        config, student_config(config), step_settings(args), SHARDS, teacher_need="never", whole_gradients=whole
    )
    state = model.constants["optimizer state"]  # there is no optimizer here
    estimate = model.estimate(["none"] * 4).allocated - WORKSPACE - state
    assert 0.99 * peak < estimate < 1.2 * peak


def test_reduced_gradients_add_up_in_float32(alone):
    """Each is a bf16 tensor when it comes; sums in bf16 would be off by up to half a unit in each of 12 additions."""
    accumulation = 12
    stage = sharded_stage(sizes(num_hidden_layers=2), flags(accumulation))
    single = []
    for index in range(accumulation):
        micro_step(stage, False, seed=index)
        single.append([p.grad.full_tensor().float() for p in stage.parameters()])
        stage.trainable.zero_grad(set_to_none=True)
    expected = [torch.stack(parts).double().sum(0) for parts in zip(*single)]
    for _ in range(2):  # the next window begins in the parameters' own dtype again
        for index in range(accumulation):
            micro_step(stage, index == accumulation - 1, seed=index)
        for parameter, wanted in zip(stage.parameters(), expected):
            found = parameter.grad.full_tensor()
            assert found.dtype == torch.float32
            assert (found - wanted).norm() <= 1e-6 * wanted.norm() + 1e-12
        stage.trainable.zero_grad(set_to_none=True)


def test_whole_gradients_where_there_is_room_for_them(alone):
    config, ranks = sizes(), Ranks(world_size=2)  # asks the group, which is this process alone
    args = flags(4)
    student = student_config(config)
    whole, reduced = (
        estimate_memory(config, student, step_settings(args), shards=2, whole_gradients=whole).needed
        for whole in (True, False)
    )
    assert reduced < whole
    for free, expected in ((whole, True), ((whole + reduced) / 2, False), (None, False)):
        chosen, estimate = settle_parallel(config, student, args, "fsdp", free, ranks)
        assert chosen == "fsdp" and estimate.whole_gradients is expected
        assert free is None or estimate.needed <= free


def test_after_an_evaluation_what_is_trained_are_the_shards_again(alone):
    """A forward pass alone leaves FSDP2's root and head whole: an optimizer made then would train these."""
    stage = sharded_stage(sizes(), flags(1))
    shards = list(stage.trainable.parameters())
    tokens, valid = torch.zeros(1, 17, dtype=torch.long), torch.ones(1, 16, dtype=torch.bool)
    with torch.no_grad():
        stage.trainable(tokens[:, :-1], tokens[:, 1:], valid, None, None, torch.tensor(1.0))
    assert [p is shard for p, shard in zip(stage.trainable.parameters(), shards)].count(False) >= 2
    parallel.reshard(stage.trainable)
    assert all(p is shard for p, shard in zip(stage.trainable.parameters(), shards, strict=True))


def test_whole_models_at_first_are_counted():
    """What every rank loads whole before it shards, and what the alignment stages hold beside it."""
    config = sizes(num_hidden_layers=8)
    student = student_config(config)
    settings = step_settings(flags(1))
    sharded, loaded, aligned = (
        estimate_memory(config, student, settings, shards=8, whole_until=until) for until in ("", "loaded", "aligned")
    )
    teacher = teacher_sizes(config)[0]
    own = sum(p.numel() for p in meta_student(config, student, settings).parameters())
    assert loaded.parts["teacher weights"] == 2 * teacher and loaded.parts["student weights"] == 2 * own
    assert sharded.allocated < loaded.allocated < aligned.allocated
    assert (sharded.moment, loaded.moment) == ("", "while the models are loaded")
    assert "in the alignment stages" in aligned.describe() and aligned.parts["optimizer state"] > 0


@pytest.mark.parametrize(
    ("argv", "names", "fresh", "expected"),
    [
        ([], ["stage1"], True, []),
        (["--layers", "auto:2"], ["stage1"], True, ["--layers auto:K"]),
        (["--layers", "auto:2"], ["stage1"], False, []),  # they are chosen: a run that resumes
        (["--hidden_tokens", "64"], ["hidden", "stage1"], True, ["the alignment stages"]),
        (["--hidden_tokens", "64"], ["stage1"], False, []),  # they are over
        (["--teacher_fp8", "--teacher_device", "cpu"], ["stage1"], True, ["--teacher_device", "--teacher_fp8"]),
    ],
)
def test_what_needs_whole_models(argv, names, fresh, expected):
    args = parse_arguments(["--device", "cpu", *argv])
    assert whole_models_for(args, names, Ranks(world_size=2), fresh=fresh) == expected
