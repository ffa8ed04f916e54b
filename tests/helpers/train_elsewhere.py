"""train.py on a host of another name, whose lock beats quickly."""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoints import lock

socket.gethostname = lambda: "elsewhere"
lock.RunLock.__init__.__kwdefaults__["beat"] = 0.2

import train  # noqa: E402

sys.exit(train.main())
