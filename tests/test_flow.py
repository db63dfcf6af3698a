"""Stages that run at once: order, bounds, errors, and how busy the device was."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from solov2_jax.download import DownloadLimits, fetch, without_secrets
from solov2_jax.tools.predict.pipeline import (
    SHAPES_AHEAD,
    DeviceUtilization,
    Picture,
    ahead,
    covered,
    read_ahead,
    start,
)
from solov2_jax.tools.predict.sources import Frame, find_files


def test_results_are_in_order_and_few_are_in_work():
    running, most = set(), []
    lock = threading.Lock()

    def work(i):
        with lock:
            running.add(i)
            most.append(len(running))
        time.sleep(0.002 * (i % 3))
        with lock:
            running.discard(i)
        return i

    taken = []

    def items():
        for i in range(40):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(3) as pool:
        results = ahead(pool, work, items(), 4)
        assert next(results) == 0
        assert len(taken) <= 5, "no more is taken than fits"
        assert list(results) == list(range(1, 40))
    assert max(most) <= 3


def test_what_a_stage_raises_is_raised_and_the_rest_is_dropped():
    def work(i):
        if i == 2:
            raise ValueError("two")
        return i

    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, work, range(10**9), 3)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)


def test_reading_ends_at_the_first_none():
    frames = [Frame(str(i), "f", "p", np.zeros((2, 2, 3), np.uint8)) for i in range(3)]
    waiting = iter(frames)

    def calls():
        while True:
            yield lambda: next(waiting, None)

    with ThreadPoolExecutor(1) as pool:
        read = list(read_ahead(pool, calls(), 5, object(), range(7, 99)))
    assert [(p.number, p.frame.name) for p in read] == [(7, "0"), (8, "1"), (9, "2")]


class Counting:
    """Stands for a predictor; remembers its batches."""

    class_names, num_devices = (), 1

    def __init__(self):
        self.batches = []

    def preprocess(self, image, image_id): ...

    def start_batch(self, batch):
        self.batches.append((batch["image"].shape[1:3], batch["image_id"].tolist()))
        scores = np.zeros(len(batch["image_id"]))
        return SimpleNamespace(detections=SimpleNamespace(scores=scores))

    def finish_batch(self, started): ...


def test_pictures_of_one_shape_share_a_batch_and_none_waits_for_ever():
    a, b, c = (32, 32), (32, 64), (64, 32)
    shapes = [a, b, a, c, a, a, *[b] * 9]
    pictures = []
    for i, shape in enumerate(shapes):
        example = {"image": np.zeros((*shape, 3), np.uint8), "image_id": np.array(i)}
        pictures.append(Picture(i, Frame(str(i), "f", "p"), example))
    predictor = Counting()
    with DeviceUtilization() as clock:
        found = [picture for group, _ in start(predictor, pictures, 2, clock) for picture in group]
    assert sorted(picture.number for picture in found) == list(range(len(shapes)))
    full = [ids for _, ids in predictor.batches if -1 not in ids]
    assert len(full) == 7 and len(predictor.batches) == 8
    assert predictor.batches[0] == (a, [0, 2])
    assert all(picture.example is None for picture in found), "images are let go"
    # One of each shape: when too many wait, a batch goes with what there is.
    many = []
    for i in range(20):
        image = np.zeros((32, 32 * (i + 1), 3), np.uint8)
        example = {"image": image, "image_id": np.array(i)}
        many.append(Picture(i, Frame(str(i), "f", "p"), example))
    with DeviceUtilization() as clock:
        stream = start(Counting(), iter(many), 2, clock)
        assert next(stream)[0][0].number <= SHAPES_AHEAD * 2


def test_busy_time_counts_overlaps_once_and_no_compilation():
    assert covered([], 0.0, 1.0) == 0
    assert covered([(1.0, 3.0), (2.0, 4.0), (6.0, 7.0)], 0.0, 10.0) == 4
    assert covered([(-5.0, 1.0), (0.5, 2.0), (9.0, 99.0)], 0.0, 10.0) == 3
    with DeviceUtilization() as clock:
        clock._begin, clock._end = 0.0, 10.0
        clock._busy += [(0.0, 4.0), (3.0, 6.0)]
        clock._compiling += [(1.0, 2.0), (8.0, 9.0)]
        share, seconds, compiled = clock.summary()
    assert (share, seconds, compiled) == (5 / 8, 8, 2)


def test_the_clock_sees_a_compilation_and_what_it_watches():
    import jax
    import jax.numpy as jnp

    program = jax.jit(lambda x: jnp.sin(x) @ x)
    with DeviceUtilization() as clock:
        began = time.perf_counter()
        result = program(np.ones((200, 200), np.float32))
        clock.watch(began, result)
        jax.block_until_ready(result)
        with clock.busy():
            time.sleep(0.02)
    share, seconds, compiled = clock.summary()
    assert compiled > 0 and 0 < share <= 1 and seconds >= 0.02


def test_finds_a_file_a_folder_and_a_pattern(tmp_path):
    for name in ("a.JPG", "b.png", "c.mp4", "d.txt", ".hidden.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.png").touch()
    names = [path.removeprefix(f"{tmp_path}/") for path in find_files(str(tmp_path))]
    assert names == ["a.JPG", "b.png", "c.mp4"]
    assert find_files(str(tmp_path / "d.txt")) == [str(tmp_path / "d.txt")]
    assert len(find_files(str(tmp_path / "**" / "*.png"))) == 2
    # Links that lead back: each folder is visited once.
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "deep" / "loop2").symlink_to(tmp_path / "deep")
    assert len(find_files(str(tmp_path / "**" / "*.png"))) == 2
    odd = tmp_path / "a[1].png"
    odd.touch()
    assert find_files(str(odd)) == [str(odd)], "an existing name is no pattern"
    for source in (tmp_path / "missing.jpg", tmp_path / "*.tif"):
        with pytest.raises(ValueError, match="no such file, and as a pattern"):
            find_files(str(source))


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/missing"):
            self.send_error(404, "Not Found")
            return
        if self.path.startswith(("/loop", "/to_file")):
            self.send_response(302)
            self.send_header("Location", self.path if "loop" in self.path else "file:///etc/hosts")
            self.end_headers()
            return
        if self.path.startswith("/escape"):
            self.wfile.write(b"HTTP/1.0 418 \x1b[31mteapot\x1b\r\n\r\n")
            return
        if "drip" in self.path:
            begin = b"HTTP/1.0 200 OK\r\n" + b"\r\n" * ("headers" not in self.path)
            for i in range(80):
                try:
                    self.wfile.write(begin if i == 0 else b"X")
                except OSError:
                    return
                time.sleep(0.025)
            return
        body = b"x" * 5000
        if "login" in self.path:
            body = self.headers["Authorization"].encode()
        self.send_response(200)
        kind = "image/png" if "noname" in self.path else "application/octet-stream"
        self.send_header("Content-Type", kind)
        if "short" in self.path:
            self.send_header("Content-Length", "9000")
        if "garbage_length" in self.path:
            self.send_header("Content-Length", "-5e3")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): ...


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_fetched_within_limits(address, tmp_path):
    folder = str(tmp_path)
    path = fetch(f"{address}/x/photo%20%2F..%2Fa.jpg?size=1", folder)
    assert path == f"{folder}/a.jpg" and os.path.getsize(path) == 5000
    assert fetch(f"{address}/noname", folder) == f"{folder}/noname.png"
    with pytest.raises(ValueError, match=r"larger than 0.004 MB \(--download_mb\)"):
        fetch(f"{address}/big.jpg", folder, DownloadLimits(max_bytes=4000))
    with pytest.raises(ValueError, match="the server answers 404 Not Found"):
        fetch(f"{address}/missing.jpg", folder)
    with pytest.raises(ValueError, match="ended after 5000 of 9000|cannot be fetched"):
        fetch(f"{address}/short.jpg", folder)
    assert not (tmp_path / "big.jpg").exists()
    assert fetch(f"HTTP{address[4:]}/b\u00fccher.jpg", folder) == f"{folder}/b\u00fccher.jpg"


def test_hostile_servers(address, tmp_path):
    folder, begin = str(tmp_path), time.monotonic()
    for path, why in (
        ("drip.jpg", "took longer than 0.5 s|too slow"),
        ("drip_headers.jpg", "took longer than 0.5 s"),
        ("loop.jpg", "redirect"),
        ("to_file.jpg", "the server answers 302|unknown url type|not allowed"),
        ("escape.jpg", r"the server answers 418 \[31mteapot$"),
        ("garbage_length.jpg", ""),
    ):
        if not why:  # the length is ignored, the body counts
            assert os.path.getsize(fetch(f"{address}/{path}", folder)) == 5000
            continue
        with pytest.raises(ValueError, match=why) as error:
            fetch(f"{address}/{path}", folder, DownloadLimits(seconds=0.5))
        assert str(error.value).isprintable()
    assert time.monotonic() - begin < 10


def test_a_password_is_sent_and_never_told(address, tmp_path):
    with_login = address.replace("://", "://me:geh%40eim@")
    path = fetch(f"{with_login}/login.jpg?token=geheim", str(tmp_path))
    assert Path(path).read_bytes() == b"Basic bWU6Z2VoQGVpbQ=="
    for broken in (f"{with_login}/missing.jpg?key=geheim", "http://me:geheim@[1/a.jpg"):
        with pytest.raises(ValueError) as error:
            fetch(broken, str(tmp_path))
        assert "geh" not in str(error.value)
    shown = without_secrets("rtsp://me:gehe/im@camera:554/stream?pw=geheim")
    assert "geheim" not in shown
    assert without_secrets("http://a:geheim@host?x=geheim") == "http://host"


def test_no_server_is_one_error(tmp_path):
    for address in ("http://127.0.0.1:9/a.jpg", "http:///a.jpg"):
        with pytest.raises(ValueError, match="cannot be fetched"):
            fetch(address, str(tmp_path))
