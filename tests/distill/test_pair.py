"""The teacher a micro step ahead, traced: on the CPU who runs and what is copied when, on one GPU which streams."""

import contextlib
import itertools
import json
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from distill.distillation import kd_micro_step
from distill.losses import chunked_kd_loss
from distill.teacher import OwnTeacher
from helpers.stages import batches_of, make_stage
from helpers.teachers import TEACHERS, make_student, make_teacher
from optim.step import clip_and_step
from trainer import feed

WINDOW = 4  # micro steps of an optimizer step
TOKENS = 64  # of a sequence
WIDTH = 64  # of a hidden state
TEACHER_SLEEPS, STUDENT_SLEEPS = 20_000_000, 100_000_000  # clock cycles: about 10 and 50 ms


class Crossings(TorchDispatchMode):
    """Tells of every copy from one device to another."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.told.append(f"{list(result.shape)} crosses")
        return result


@pytest.mark.parametrize("ahead", [True, False])
def test_only_hidden_states_cross_a_micro_step_before_they_are_used(ahead):
    """The teacher is on the CPU, the student on the meta device, so that what crosses is copied for real."""
    teacher, meta = make_teacher(TEACHERS["grouped queries"]), torch.device("meta")
    student = make_student(teacher, [1]).to(meta)
    tokens = torch.randint(0, 512, (3, TOKENS + 1))
    stage = make_stage(teacher, student, batches_of(tokens, torch.ones(3, TOKENS, dtype=torch.bool), 1))
    own = OwnTeacher(teacher, meta, ahead=None if ahead else False)
    stage.device, stage.ahead = meta, own.ahead
    told = []
    own.backbone.register_forward_pre_hook(lambda *_: told.append("teacher"))
    student.backbone.register_forward_pre_hook(lambda *_: told.append("student"))
    student.backbone.embedding.weight.register_post_accumulate_grad_hook(lambda *_: told.append("backward done"))
    head = teacher.lm_head.weight.to(meta)

    def step(inputs, labels, valid, positions, hidden, scale):  # `StudentLoss` asks for a device with autocast
        ours = student.backbone(inputs).last_hidden_state
        return chunked_kd_loss(ours, student.lm_head.weight, hidden, head, labels, valid, grad_scale=scale)

    micro_step, batches = kd_micro_step(step, own), list(feed(stage))
    with Crossings(told):
        for batch in batches:
            micro_step(batch, torch.ones((), device=meta))
    theirs, ours = ["teacher", f"[1, {TOKENS}, {WIDTH}] crosses"], ["student", "backward done"]
    assert told == (theirs + (theirs + ours) * 2 + ours if ahead else (theirs + ours) * 3)


@dataclass(frozen=True)
class Work:
    """A kernel or copy on the GPU, with the call on the host that enqueued it; times in microseconds."""

    name: str
    stream: int
    begin: float
    end: float
    size: int  # bytes of a copy
    call: str
    enqueued: float


class Trace:
    """What a profiler saw: work by the ranges (`record_function`) in which the host enqueued it."""

    def __init__(self, profiler, path):
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
        self.ranges = {
            event["name"]: (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "user_annotation"
        }
        self.calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
        by_number = {event["args"].get("correlation"): event for event in self.calls}
        self.work = []
        for event in events:
            if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
                continue
            about, call = event["args"], by_number[event["args"]["correlation"]]
            times = event["ts"], event["ts"] + event["dur"]
            size = about.get("bytes", 0)
            self.work.append(Work(event["name"], about["stream"], *times, size, call["name"], call["ts"]))

    def within(self, time, name):
        begin, end = self.ranges.get(name, (0.0, -1.0))
        return begin <= time <= end

    def enqueued_in(self, name, but_not=""):
        """Work of a range, that of an inner one left out, in the order of the host's calls."""
        found = [w for w in self.work if self.within(w.enqueued, name) and not self.within(w.enqueued, but_not)]
        return sorted(found, key=lambda w: w.enqueued)

    def waits_in(self, name):
        """Calls of a range that hold the host until the device is done."""
        inside = [call["name"] for call in self.calls if self.within(call["ts"], name)]
        return [call for call in inside if "Synchronize" in call]


class NamedTeacher(OwnTeacher):
    """Names the range in which the host enqueues the teacher's work on a batch."""

    def start(self, batch):
        with record_function("teacher " + batch.document_ids[0]):
            return super().start(batch)


def two_windows(teacher, student, tokens, watched, *, ahead):
    """The losses [2 * WINDOW] of two optimizer steps on one GPU, one sequence a micro step; `watched`: the second."""
    device = teacher.device
    batches = batches_of(tokens.pin_memory(), torch.ones(len(tokens), TOKENS, dtype=torch.bool).pin_memory(), 1)
    stage = make_stage(teacher, student, batches)
    own = NamedTeacher(teacher, device, ahead=ahead)
    assert own.streams is ahead
    stage.device, stage.ahead = device, own.ahead
    micro_step, scale = kd_micro_step(stage.trainable, own), torch.full((), 1 / TOKENS, device=device)
    sleeps = [
        own.backbone.register_forward_pre_hook(lambda *_: torch.cuda._sleep(TEACHER_SLEEPS)),
        student.backbone.register_forward_pre_hook(lambda *_: torch.cuda._sleep(STUDENT_SLEEPS)),
    ]
    losses, coming = [], list(feed(stage))
    for window, watch in ((coming[:WINDOW], contextlib.nullcontext()), (coming[WINDOW:], watched)):
        torch.cuda.synchronize()
        with watch:
            for batch in window:
                with record_function("micro step " + batch.document_ids[0]):
                    losses.append(micro_step(batch, scale)["loss"])
            torch.cuda.synchronize()
        clip_and_step(stage.optimizer, stage.parameters(), 1.0)
        stage.optimizer.zero_grad(set_to_none=True)
    for hook in sleeps:
        hook.remove()
    return torch.stack(losses).cpu()


@pytest.mark.gpu
def test_on_one_gpu_the_teacher_works_ahead_on_streams_of_its_own(tmp_path):
    """Both models pause on their streams before each forward pass: a wait too few or too many would show."""
    torch.manual_seed(0)
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [1]).cuda()
    teacher.cuda()
    start = {name: weight.clone() for name, weight in student.state_dict().items()}
    tokens = torch.randint(0, 512, (2 * WINDOW, TOKENS + 1))
    inline = two_windows(teacher, student, tokens, contextlib.nullcontext(), ahead=False)
    student.load_state_dict(start)
    watched = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    ahead = two_windows(teacher, student, tokens, watched, ahead=True)
    assert torch.equal(ahead[:WINDOW], inline[:WINDOW])  # before an update: nothing but the same forward passes
    assert torch.allclose(ahead[WINDOW:], inline[WINDOW:], rtol=1e-4)  # after it: sums of gradients have no order
    assert len(set(inline.tolist())) == 2 * WINDOW

    trace = Trace(watched, tmp_path / "trace.json")
    names = [f"d{index}" for index in range(WINDOW, 2 * WINDOW)]
    following = dict(itertools.pairwise(names))
    ours, theirs = {}, {}
    for name in names:
        inner = "teacher " + following.get(name, "")
        ours[name] = trace.enqueued_in("micro step " + name, but_not=inner)
        assert trace.waits_in("micro step " + name) == []  # nor in the teacher's, which is inside
    for name in names[1:]:  # the first one's was enqueued in the window before
        theirs[name] = trace.enqueued_in("teacher " + name)

    (own_stream,) = {work.stream for done in ours.values() for work in done}
    copies = {name: work[-1] for name, work in theirs.items()}
    (copy_stream,) = {copy.stream for copy in copies.values()}
    (teacher_stream,) = {work.stream for done in theirs.values() for work in done[:-1]}
    assert len({own_stream, copy_stream, teacher_stream}) == 3
    for name, copy in copies.items():
        assert "DtoD" in copy.name and copy.call == "cudaMemcpyAsync" and copy.size == TOKENS * WIDTH * 4
        tokens_in = [work for work in theirs[name] if "HtoD" in work.name]
        assert tokens_in and all("Pinned" in work.name for work in tokens_in)
        assert max(work.end for work in theirs[name][:-1]) <= copy.begin  # the copy waits for its teacher,
        assert copy.end <= min(work.begin for work in ours[name])  # the student for its copy,
    for name, later in following.items():  # and the teacher for nobody: enqueued first, it is done first
        assert theirs[later][-1].enqueued < ours[name][0].enqueued
        assert theirs[later][-2].end < max(work.end for work in ours[name])
