"""serve.py as a process: real predictions over HTTP, and a signal under load."""

import http.client
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from PIL import Image

pytest.importorskip("fastapi_offline")
pytest.importorskip("uvicorn")

from solov2_jax.inference.draw import shrink
from solov2_jax.inference.predictor import Predictor
from solov2_jax.rle import rle_encode
from solov2_jax.tools.serving.engine import DRAWN_SIDE, batch_sizes, canvas_of

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 12


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((64, 64),)
    return tiny_network.write_workdir(tmp_path_factory.mktemp("w") / "run", config)


def picture(height, width, seed=0):
    """Returns (pixels, PNG)."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height))
    file = io.BytesIO()
    image.save(file, "PNG")
    return np.asarray(image), file.getvalue()


def post(port, body, query=""):
    """Returns (status, body) of an answer, or (None, b"") where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.connect()
    except ConnectionRefusedError:
        return None, b""
    try:
        head = {"Content-Type": "image/png"}
        connection.request("POST", "/predict" + query, body, head)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_service_answers_as_the_predictor_does_and_ends_in_order(workdir):
    command = [sys.executable, "serve.py", f"--workdir={workdir}", "--port=0"]
    command += ["--batch_size=2", "--score=0", f"--queue={CLIENTS}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(x for x in process.stdout if "listening on" in x)
        port = int(line.rsplit(":", 1)[1])
        same_as_predictor(port, Predictor.from_workdir(workdir))
        found = post(port, picture(90, 70)[1], "?output=png")
        assert Image.open(io.BytesIO(found[1])).size == (70, 90)
        ends = end_under_load(port, process)
        assert ends.pop(200) > CLIENTS
        assert set(ends) <= {None}, ends
        assert process.wait(60) == 0
        assert "every accepted request was answered" in process.stdout.read()
    finally:
        process.kill()
        process.communicate()


def same_as_predictor(port, predictor):
    for size in ((600, 130), (60, 50), (96, 128)):
        pixels, body = picture(*size)
        want = predictor(pixels)
        status, answer = post(port, body)
        assert status == 200
        answer = json.loads(answer)
        assert (answer["height"], answer["width"]) == size
        got = answer["detections"]
        assert len(got) == len(want) == 10
        np.testing.assert_allclose([d["score"] for d in got], want.scores, rtol=1e-6)
        names = [predictor.class_names[i] for i in want.labels]
        assert [d["class_name"] for d in got] == names
        counts = rle_encode(want.masks, want.boxes)
        assert [d["segmentation"]["counts"] for d in got] == counts
    few = json.loads(post(port, body, "?limit=3")[1])["detections"]
    assert few == got[:3]
    assert json.loads(post(port, body, "?score=1")[1])["detections"] == []


def end_under_load(port, process):
    """Returns how requests of many clients end while the service is told to stop."""
    ends: dict[int | None, int] = {}
    body, lock = picture(64, 64)[1], threading.Lock()

    def client():
        while True:
            try:
                status, _ = post(port, body)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            with lock:
                ends[status] = ends.get(status, 0) + 1
            if status != 200:
                return

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while ends.get(200, 0) <= CLIENTS:
        threads[0].join(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    return ends


def test_wrong_flags_are_one_error(tmp_path):
    for flags, message in (
        ([], "give either --workdir"),
        ([f"--workdir={tmp_path}"], "has no config.json"),
        ([f"--workdir={tmp_path}", "--port=70000"], "port"),
    ):
        command = [sys.executable, "serve.py", *flags]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 2 and found.stderr.startswith("error: ")
        assert message in found.stderr and "Traceback" not in found.stderr


def test_programs_are_few():
    assert batch_sizes(1) == (1,) and batch_sizes(6) == (1, 2, 4, 6)
    assert canvas_of((1, 129)) == (512, 512) and canvas_of((128, 1)) == (128, 128)
    assert canvas_of((128, 4096)) == (512, 512), "in parts"
    small = np.zeros((10, 20, 3), np.uint8)
    assert shrink(small, DRAWN_SIDE) is small
    assert shrink(np.zeros((4000, 1, 3), np.uint8), DRAWN_SIDE).shape == (1600, 1, 3)
