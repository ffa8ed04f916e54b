"""train.py that tokenises a few documents at a time, so that a small run does not read its whole text ahead."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from text import packing

packing.FIRST_CHARACTERS = packing.MOST_CHARACTERS = 1 << 15
sys.exit(train.main())
