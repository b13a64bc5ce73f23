"""A program that starts a server and holds it, for tests that end it in all ways."""

import os
import signal
import sys
import time
from pathlib import Path

from opcd.runtime import processes
from opcd.runtime.interrupts import Ended, raised
from opcd.serving.process import free_port, running

processes.GRACE_S = 0.3
FAKE = str(Path(__file__).parent / "fake_vllm.py")


def main(how: str) -> None:
    port = free_port()
    command = [
        *(sys.executable, FAKE, "-m", "vllm.entrypoints.openai.api_server"),
        *("--port", str(port), "--served-model-name", "tiny"),
    ]
    with raised(), running(lambda _: command, lambda *_: dict(os.environ)) as started:
        while not (started.folder / "tmp" / "vllm_dist_1").exists():
            time.sleep(0.02)
        print(port, started.process.pid, started.folder, started.key, flush=True)
        if how == "raises":
            raise RuntimeError("of the measurement")
        if how == "waits":
            time.sleep(600)


if __name__ == "__main__":
    # A shell's background job, and all that it starts, would not hear of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1])
    except Ended as error:
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        sys.exit(130)
