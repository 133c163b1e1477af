"""The server answers with the numbers of eager code, in a process that cannot import deqcore."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BLOCKED = "import runpy, sys; sys.modules['deqcore'] = sys.modules['deqcore_torch'] = None; sys.argv = sys.argv[1:]; "


def ask(port: int, body: object) -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{port}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "model.pt2"
    subprocess.run([sys.executable, str(EXAMPLE / "export.py"), str(path)], check=True, timeout=600)
    program = runpy.run_path(str(EXAMPLE / "export.py"))
    command = [sys.executable, "-c", BLOCKED + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    server = subprocess.Popen(
        [*command, str(EXAMPLE / "server.py"), str(path), "0"],
        stdout=subprocess.PIPE, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        yield program["make"](), int(line.split()[-1])
    finally:
        server.kill()
        server.wait()


def test_answers_are_those_of_the_eager_model_for_every_batch_size(served):
    model, port = served
    for batch in (1, 5):
        x = torch.randn(batch, 8)
        answer = ask(port, {"inputs": x.tolist()})
        assert torch.allclose(torch.tensor(answer["scores"]), model(x)[0], atol=1e-4)
        assert answer["converged"] == [True] * batch


@pytest.mark.parametrize("body", [{"inputs": [[1.0, 2.0]]}, {"input": []}, {"inputs": "text"}])
def test_a_bad_request_is_an_answer_and_the_server_goes_on(served, body):
    _, port = served
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(port, body)
    assert caught.value.code == 400
    assert "error" in json.loads(caught.value.read())
    assert ask(port, {"inputs": [[0.0] * 8]})["converged"] == [True]
