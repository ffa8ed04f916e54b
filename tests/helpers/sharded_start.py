"""Under torchrun: build a pair from a teacher's folder, and print how far each rank's resident memory rose (bytes).

usage: sharded_start.py TEACHER STUDENT none|fsdp
"""

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from arguments import parse_arguments
from checkpoints.origins import Origins
from hardware.ranks import launched
from run.build import build_models
from run.inputs import Inputs


class Text:
    origins = Origins()

    def calibration_tokens(self, name):
        return torch.arange(64)[None] % 500


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(teacher, student, parallel):
    cpu = torch.device("cpu")
    args = parse_arguments(["--teacher_model", teacher, "--device", "cpu", "--layers", "1", "--dtype", "bfloat16"])
    with launched("cpu") as ranks:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
        models = build_models(
            args, student, Inputs(Text(), None, None, None, "throughout", parallel), (cpu, cpu), ranks
        )
        figures = {"peak": resident("VmHWM") - before, "after": resident("VmRSS") - before}
        sizes = [sum(p.numel() * 2 for p in model.parameters()) for model in (models.teacher, models.student)]
        found = ranks.gather(figures)
        if ranks.is_first:
            print(json.dumps({"ranks": found, "teacher": sizes[0], "student": sizes[1]}), flush=True)


main(*sys.argv[1:])
