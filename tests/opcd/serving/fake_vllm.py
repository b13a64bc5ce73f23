#!/usr/bin/env python3
"""An interpreter that says it has vLLM, and a vLLM that serves nothing real, with its children.

With ``FAKE_CHILDREN`` it has three: one that ignores SIGTERM, one in a session of its own, and one
without its parent's environment. ``FAKE_TROUBLE`` says what goes wrong: "dies", "deaf";
"float32" or "lora": it dies where it is asked for that.
``FAKE_ANSWERS`` names a file with responses to what is not streamed, by the text of the last
message; ``FAKE_SEEN`` one to which a line is added for each start, with arguments and environment.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import Behaviour, server

SLEEP = "import signal, time; {} time.sleep(600)"
DEAF = SLEEP.format("signal.signal(signal.SIGTERM, signal.SIG_IGN);")


def main() -> None:
    if sys.argv[1] == "-c":
        print(json.dumps({"package": "vllm-fake", "version": "0.0.1", "device": "cpu"}))
        return
    assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
    given = dict(zip(sys.argv, sys.argv[1:], strict=False))
    if seen := os.environ.get("FAKE_SEEN"):
        with Path(seen).open("a") as file:
            line = {"argv": sys.argv, "environ": dict(os.environ), "cwd": os.getcwd()}
            file.write(json.dumps(line | {"files": os.listdir()}) + "\n")
    trouble = os.environ.get("FAKE_TROUBLE", "")
    refused = {"float32": given.get("--dtype") == "float32", "lora": "--lora-modules" in given}
    if trouble == "dies" or refused.get(trouble):
        sys.exit("RuntimeError: no room for the weights")
    if os.environ.get("FAKE_CHILDREN"):
        subprocess.Popen([sys.executable, "-S", "-c", DEAF])
        subprocess.Popen([sys.executable, "-S", "-c", SLEEP.format("")], start_new_session=True)
        subprocess.Popen([sys.executable, "-S", "-c", SLEEP.format("")], env={})
    Path(tempfile.gettempdir(), "vllm_dist_1").write_text("left behind")
    Path(os.environ.get("VLLM_CACHE_ROOT", tempfile.gettempdir())).mkdir(exist_ok=True)
    if trouble == "deaf":
        print("loading for ever", flush=True)
        time.sleep(600)
    served = [given["--served-model-name"]]
    served += [given["--lora-modules"].partition("=")[0]] if "--lora-modules" in given else []
    caching = "--enable-prefix-caching" in sys.argv
    answers: dict = {}
    if os.environ.get("FAKE_ANSWERS"):
        answers = json.loads(Path(os.environ["FAKE_ANSWERS"]).read_text())
    behaviour = Behaviour(
        models=served,
        key=os.environ.get("VLLM_API_KEY"),
        caching=caching,
        # Reading takes time, but for what is cached.
        first_s=0.001 if caching else 0.002,
        answer=lambda body: answers[body["messages"][-1]["content"]],
    )
    server(behaviour, int(given["--port"])).serve_forever()


if __name__ == "__main__":
    main()
