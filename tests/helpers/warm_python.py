"""`python SCRIPT ...` for a shell: asks the tests (`pages.Desk`) for a warm process, and stands for it.

python -S tests/helpers/warm_python.py SOCKET SCRIPT [FLAG ...]
Output, folder and environment are this process'; signals go on to the warm one, whose end this one shares.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(address: str, script: str, flags: list[str]) -> None:
    """Ends as the warm process does, by status or signal."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        files = line.makefile("rw")
        asked = {"script": script, "flags": flags, "cwd": os.getcwd(), "pid": os.getpid()}
        print(json.dumps({**asked, "environment": {**os.environ}}), file=files, flush=True)
        pid = int(files.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int(files.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
