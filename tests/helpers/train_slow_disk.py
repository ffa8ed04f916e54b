"""train.py whose first rank needs 12 s to write a checkpoint, in the background."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from checkpoints import store as checkpoints

write = checkpoints.CheckpointStore._write_folder


def slowly(self, job):
    time.sleep(12)
    write(self, job)


checkpoints.CheckpointStore._write_folder = slowly
sys.exit(train.main())
