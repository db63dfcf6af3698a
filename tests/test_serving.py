"""The service: its limits, queue and errors, with an engine that waits for a gate."""

import contextlib
import dataclasses
import http.client
import io
import json
import logging
import re
import resource
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi_offline")
pytest.importorskip("uvicorn")

from solov2_jax.tools.serving.app import Limits, make_app
from solov2_jax.tools.serving.batcher import Batcher
from solov2_jax.tools.serving.pictures import RequestRefused, decode
from solov2_jax.tools.serving.server import bind, make_server

LIMITS = Limits(
    max_bytes=20_000,
    max_pixels=40_000,
    queue=3,
    body_seconds=0.4,
    batch_size=2,
    batch_wait=0.0,
    score=0.3,
)
MAX_CONNECTIONS = 20


class Engine:
    """Answers with what it got; waits for `gate` before."""

    class_names = ("cat", "<img src=x onerror=alert(1)>")

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []

    def preprocess(self, image, score, limit, drawn):
        return (image.shape, score, limit, drawn)

    def answer(self, jobs):
        assert self.gate.wait(20)
        self.batches.append(len(jobs))
        if jobs[0][2] == 13:
            raise RuntimeError("a defect")
        if jobs[0][2] == 77:
            return [b"[" + b" " * 30_000_000 + b"]" for _ in jobs]
        return [json.dumps(job).encode() for job in jobs]


@pytest.fixture(scope="module")
def service():
    """A running service: (port, engine)."""
    engine = Engine()
    server = make_server(
        make_app(engine, LIMITS, "a test"),
        max_connections=MAX_CONNECTIONS,
        header_seconds=0.4,
        write_seconds=0.6,
    )
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    log = logging.getLogger("solov2_jax")
    level = log.level
    log.setLevel(logging.CRITICAL)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield sock.getsockname()[1], engine
    server.should_exit = True
    thread.join(20)
    log.setLevel(level)
    assert not thread.is_alive()


def picture(width=30, height=20, kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


def ask(port, body=b"", query="", method="POST", path="/predict", **headers):
    """Returns (status, answer as JSON or bytes, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        headers.setdefault("Content-Type", "image/png")
        connection.request(method, path + query, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        if answer.headers.get_content_type() == "application/json":
            data = json.loads(data)
        return answer.status, data, answer.headers
    finally:
        connection.close()


def test_an_image_gets_its_answer(service):
    port, _ = service
    assert ask(port, picture())[:2] == (200, [[20, 30, 3], 0.3, 100, False])
    query = "?score=0.75&limit=4&output=png"
    assert ask(port, picture(kind="BMP"), query, Content_Type="image/bmp")[0] == 200
    assert json.loads(ask(port, picture(), query)[1]) == [[20, 30, 3], 0.75, 4, True]


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    assert decode(picture(mode=mode), 40_000).shape == (20, 30, 3)


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


REFUSED = {
    "no image": (b"<html>" * 9, {}, 415, "the body is not an image"),
    "a text": (b"text", {"Content_Type": "text/plain"}, 415, "is 'text/plain'"),
    "a form": (
        picture(),
        {"Content_Type": "multipart/form-data; boundary=x"},
        415,
        "send the image's bytes as the body",
    ),
    "empty": (b"", {}, 400, "the body is empty"),
    "truncated": (picture(150, 150, "JPEG")[:400], {}, 400, "truncated or damaged"),
    "too many bytes": (b"\0" * 30_000, {}, 413, "more than 20000 bytes"),
    "too many pixels": (picture(300, 200), {}, 413, "300 x 200 pixels"),
    "a bomb": (bomb(10_000), {}, 413, "10000 x 10000 pixels"),
    "a large bomb": (bomb(60_000), {}, 413, "far more than 40000 pixels"),
    "thin": (picture(20_000, 1), {}, 413, "a side may have at most 16384"),
    "16 bits": (picture(mode="I;16"), {}, 415, "8 bits a channel"),
    "an animation's kind": (picture(kind="GIF", mode="P"), {}, 415, "not an image"),
    "a program's kind": (b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, 415, "not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_body_is_refused(service, name):
    port, engine = service
    body, headers, status, message = REFUSED[name]
    before = len(engine.batches)
    found, answer, _ = ask(port, body, **headers)
    assert found == status and message in answer["error"]
    assert len(engine.batches) == before


def test_a_body_without_a_length_is_cut(service):
    port, _ = service

    def endless():
        for _ in range(100):
            yield b"\0" * 1000

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Content-Type": "image/png"}
    connection.request("POST", "/predict", endless(), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and b"20000 bytes" in answer.read()
    connection.close()


@pytest.mark.parametrize(
    "query",
    [
        "?output=../../etc/passwd",
        "?score=2",
        "?score=nan",
        "?limit=0",
        "?limit=" + "9" * 400,
        "?score=%00",
    ],
)
def test_a_bad_parameter_is_refused(service, query):
    port, _ = service
    status, answer, _ = ask(port, picture(), query)
    assert status == 422 and answer["detail"][0]["loc"][0] == "query"


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/static-offline-docs/../core.py",
        "/%00",
    ],
)
def test_no_path_leads_to_files(service, path):
    port, _ = service
    assert ask(port, method="GET", path=path)[0] == 404


def test_one_more_than_the_queue_takes_is_told_to_come_again(service):
    port, engine = service
    engine.gate.clear()
    found = []

    def run():
        found.append(ask(port, picture())[0])

    threads = [threading.Thread(target=run) for _ in range(LIMITS.queue)]
    for thread in threads:
        thread.start()
    while ask(port, method="GET", path="/healthz")[1]["admitted"] < LIMITS.queue:
        time.sleep(0.01)
    status, answer, headers = ask(port, picture())
    assert status == 429 and "try again" in answer["error"]
    assert headers["Retry-After"] == "1"
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert found == [200] * LIMITS.queue
    assert ask(port, picture())[0] == 200


def test_what_waits_is_computed_together(service):
    port, engine = service
    engine.gate.clear()
    engine.batches.clear()
    threads = [threading.Thread(target=ask, args=(port, picture())) for _ in range(3)]
    for thread in threads:
        thread.start()
    while ask(port, method="GET", path="/healthz")[1]["admitted"] < 3:
        time.sleep(0.01)
    time.sleep(0.2)  # all decoded
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert sorted(engine.batches) == [1, 2]


def test_a_slow_body_is_given_up(service):
    port, _ = service
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000\r\n\r\nabc"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    assert ask(port, method="GET", path="/healthz")[1]["admitted"] == 0


def slow_body(port):
    """Returns a connection on which a body comes for ever, byte by byte."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        b"Content-Length: 1000\r\n\r\na"
    )
    return client


def test_slow_bodies_take_no_place_in_the_queue(service):
    port, _ = service
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            for _ in range(2 * LIMITS.queue):
                stack.enter_context(slow_body(port))
            assert [ask(port, picture())[0] for _ in range(4)] == [200] * 4


def test_bodies_on_their_way_are_bounded_together(service):
    port, _ = service
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += b"Content-Length: 20000\r\n\r\n"
    ends = []
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(2 * LIMITS.queue + 2):
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            clients.append(stack.enter_context(client))
            client.sendall(head + b"x" * 19_900)
        ends = [client.recv(100).split(b" ")[1] for client in clients]
    assert b"429" in ends and set(ends) <= {b"429", b"408"}
    assert ask(port, picture())[0] == 200


def test_who_does_not_read_the_answer_is_closed(service):
    port, _ = service
    body = picture()
    request = b"POST /predict?limit=77 HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(LIMITS.queue):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(request)
            clients.append(stack.enter_context(client))
        until = time.monotonic() + 15
        while ask(port, method="GET", path="/healthz")[1]["admitted"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1.5)
        for client in clients:
            client.settimeout(20)
            read = 0
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(1 << 20):
                    read += len(part)
            assert read < 30_000_000, "the rest was given up"
    # Who reads gets all of it.
    assert ask(port, picture(), "?limit=77")[1] == []


def test_a_signal_ends_it_within_seconds_whatever_clients_do():
    engine = Engine()
    limits = dataclasses.replace(LIMITS, body_seconds=60.0)
    server = make_server(make_app(engine, limits, "a test"), max_connections=9, header_seconds=60.0)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    body = picture()
    head = b"POST /predict?limit=77 HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with slow_body(port), socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until = time.monotonic() + 20
        while not engine.batches:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.3)
        begin = time.monotonic()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and time.monotonic() - begin < 12


@pytest.mark.parametrize("start", [b"", b"POST /pre", b"GET / HTTP/1.1\r\nHost:"])
def test_a_header_that_does_not_come_ends_the_connection(service, start):
    port, _ = service
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(start)
        assert ended(client)


def test_an_idle_connection_is_ended_after_an_answer(service):
    port, _ = service
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /heal")
        assert ended(client)


def ended(client):
    """Returns whether the other side ends the connection before the timeout."""
    with contextlib.suppress(ConnectionResetError):  # another way to end it
        while client.recv(1000):
            continue
    return True


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_thousands_of_connections_leave_nothing_behind(service):
    port, _ = service
    resident = []
    for _ in range(20):
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                for _ in range(5 * MAX_CONNECTIONS)
            ]
            assert all(ended(client) for client in clients)
        resident.append(resident_bytes())
    assert ask(port, picture())[0] == 200
    assert resident[-1] - resident[0] < 5e6


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_header_without_end_is_refused(service):
    port, _ = service
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
        try:
            answer = client.recv(100)
        except ConnectionResetError:
            answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 4")


def test_a_defect_is_answered_500_and_survived(service, caplog):
    port, _ = service
    assert ask(port, picture(), "?limit=13")[0] == 500
    assert ask(port, picture())[0] == 200


def test_interface_metrics_and_page(service):
    port, _ = service
    schema = ask(port, method="GET", path="/openapi.json")[1]
    post = schema["paths"]["/predict"]["post"]
    assert set(post["requestBody"]["content"]) >= {"image/jpeg", "image/png"}
    assert {"200", "400", "408", "413", "415", "429"} <= set(post["responses"])
    assert {p["name"] for p in post["parameters"]} == {"output", "score", "limit"}
    assert ask(port, method="GET", path="/readyz")[:2] == (200, {"status": "ready"})
    assert ask(port, method="GET", path="/classes")[1]["classes"] == list(Engine.class_names)
    assert ask(port, method="GET", path="/redoc")[0] == 404
    for path in ("/docs", "/openapi.json", "/", "/metrics"):
        shown = ask(port, method="GET", path=path)[1]
        assert "onerror" not in str(shown), path
    viewer = ask(port, method="GET", path="/docs")[1]
    assert b"//" not in viewer.replace(b"://www.w3.org", b""), "nothing from elsewhere"
    for address in re.findall(rb'(?:src|href)="([^"]+)"', viewer):
        assert ask(port, method="GET", path=address.decode())[0] == 200
    assert b"<html" in ask(port, method="GET", path="/")[1]
    text = ask(port, method="GET", path="/metrics")[1].decode()
    assert 'solov2_requests_total{status="200"}' in text
    assert "solov2_batch_seconds_count" in text


def test_closing_answers_what_waits():
    gate = threading.Event()
    batches = []

    def answer(jobs):
        gate.wait(20)
        batches.append(len(jobs))
        return jobs

    batcher = Batcher(answer, 4, 0.0, lambda images, seconds: None)
    futures = [batcher.submit(i) for i in range(9)]
    futures[8].cancel()
    threading.Timer(0.05, gate.set).start()
    batcher.close()
    assert [f.result(0) for f in futures[:8]] == list(range(8))
    assert sum(batches) == 8 and not batcher.is_alive()


def test_a_taken_port_is_one_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match="give another port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_decoding_says_no_more_than_needed():
    with pytest.raises(RequestRefused) as error:
        decode(np.random.default_rng(0).bytes(500), 40_000)
    assert error.value.status == 415
