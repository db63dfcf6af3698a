"""Files that others made or broke: refused with a reason, or read, in little memory."""

import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from solov2_jax.data.images import read_header, read_image
from solov2_jax.tools.predict.sources import Names, VideoFile, open_sources
from solov2_jax.tools.predict.video import CODECS, VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parent.parent
RED = (250, 10, 10)


def png_chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(path, side):
    """A file of some kilobytes that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    squeezer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(squeezer.compress(row) for _ in range(2000)) + squeezer.flush()
    parts = (
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", rows),
        png_chunk(b"IEND", b""),
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def text_bomb(path):
    """A small picture whose comment unpacks to 200 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 200_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def write_hostile(folder):
    """Writes the files; returns {name: words of the refusal, or the size it has}."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    photo = Image.fromarray(noise)
    photo.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    photo.save(folder / "whole.png")
    bomb(folder / "bomb.png", 60_000)
    text_bomb(folder / "text_bomb.png")
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:4000])
    (folder / "text.jpg").write_text("this is no photograph")
    (folder / "empty.jpg").touch()
    (folder / "png_named.jpg").write_bytes((folder / "whole.png").read_bytes())
    Image.new("CMYK", (80, 60), (0, 250, 250, 0)).save(folder / "cmyk.jpg")
    frames = [Image.new("RGB", (80, 60), c) for c in (RED, (0, 200, 0), (0, 0, 200))]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((60, 80), 0x8000, np.uint16)).save(folder / "sixteen.png")
    palette = Image.new("P", (80, 60), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(folder / "palette.png", transparency=1)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    photo.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (20_000, 1), RED).save(folder / "line.png")
    Image.new("RGB", (1, 20_000), RED).save(folder / "column.png")
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return {
        "bomb.png": "more than",
        "text_bomb.png": "damaged",
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "text.jpg": "is not an image",
        "empty.jpg": "is empty, 0 bytes",
        "page.eps": "is not an image",
        "png_named.jpg": [60, 80],
        "cmyk.jpg": [60, 80],
        "moving.gif": [60, 80],
        "sixteen.png": [60, 80],
        "palette.png": [60, 80],
        "turned.jpg": [80, 60],
        "line.png": [1, 20_000],
        "column.png": [20_000, 1],
    }


# Reads every file with 300 MB more than the interpreter has when it starts.
READ_ALL = """
import json, resource, sys
from solov2_jax.data.images import read_image
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
found = {}
for path in sys.argv[1:]:
    try:
        found[path] = read_image(path).shape[:2]
    except ValueError as error:
        found[path] = str(error)
print(json.dumps(found))
"""


def test_each_file_is_read_or_refused_within_300_mb(tmp_path):
    expected = write_hostile(tmp_path)
    paths = [str(tmp_path / name) for name in expected]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, want in expected.items():
        got = found[str(tmp_path / name)]
        if isinstance(want, str):
            assert want in got and name in got and "\n" not in got, got
            if not name.startswith("truncated"):  # its header is whole
                with pytest.raises(ValueError, match=re.escape(name)):
                    read_header(str(tmp_path / name))
        else:
            assert got == want, name
            header = read_header(str(tmp_path / name))
            assert [header.height, header.width] == want


def test_colours_survive_odd_modes(tmp_path):
    write_hostile(tmp_path)
    for name, near in (("moving.gif", RED), ("palette.png", RED), ("line.png", RED)):
        pixels = read_image(str(tmp_path / name)).astype(int)
        assert abs(pixels - near).max() < 6, name
    assert (read_image(str(tmp_path / "sixteen.png")) == 0x80).all()
    ink = read_image(str(tmp_path / "cmyk.jpg"))[30, 40].astype(int)
    assert ink[0] > 200 and ink[1:].max() < 60, "red ink, not its negative"
    upright = read_image(str(tmp_path / "whole.jpg")).astype(int)
    turned = read_image(str(tmp_path / "turned.jpg")).astype(int)
    assert abs(turned - np.rot90(upright, -1)).mean() < 3


def test_every_frame_of_an_animation_is_read_in_a_folder_and_alone(tmp_path):
    frames = [Image.new("RGB", (8, 6), (i * 40, 0, 0)) for i in range(4)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "a.gif", tmp_path / "a.gif"):
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=200)
    frames[1].save(folder / "b.png")
    options = {"scratch": "", "threads": 1, "limit": 0, "every": 1}
    images, video = open_sources(str(folder), **options)
    read = [call() for call in images.calls()]
    assert [frame.image[0, 0, 0] for frame in read if frame] == [40]
    assert read_all(video) == [0, 40, 80, 120]
    (video,) = open_sources(str(tmp_path / "a.gif"), **options)
    assert isinstance(video, VideoFile) and video.fps == 5
    assert read_all(video) == [0, 40, 80, 120]


def read_all(video):
    """Returns the red of each frame's first pixel."""
    reds = []
    for call in video.calls():
        frame = call()
        if frame is None:
            return reds
        reds.append(int(frame.image[0, 0, 0]))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="no image in this folder; names must end as images"):
        open_sources(str(tmp_path), "", threads=1, limit=0, every=1)


def problem_of(path):
    """Returns how many frames a source gives and what it says is wrong."""
    (source,) = open_sources(str(path), "", threads=1, limit=0, every=1)
    frames = list(itertools.takewhile(lambda f: f is not None, (c() for c in source.calls())))
    return sum(not f.problem for f in frames), "".join(f.problem for f in frames)


def test_times_and_pauses_are_kept(tmp_path):
    times = [0.0, 0.1, 0.2, 2.2, 2.3, 2.4]
    writer = VideoWriter(str(tmp_path / "pause"), 10.0)
    for seconds in times:
        writer.write(np.zeros((32, 48, 3), np.uint8), seconds)
    written = [seconds for _, seconds in VideoReader(writer.close()).frames()]
    assert written == pytest.approx(times, abs=1e-3)
    frames = [Image.new("RGB", (8, 6), (i * 40, 0, 0)) for i in range(6)]
    pauses = [100, 100, 2000, 100, 100, 100]
    for suffix in (".gif", ".png", ".webp"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses)
        (video,) = open_sources(str(path), "", threads=1, limit=0, every=1)
        assert [s for _, s in video.reader.frames()] == pytest.approx(times), suffix


def test_every_page_of_a_stack_is_read_and_a_cut_one_is_told(tmp_path):
    pages = [Image.new("RGB", (200, 160 + i), (i * 40, 0, 0)) for i in range(5)]
    path = tmp_path / "stack.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    (stack,) = open_sources(str(path), "", threads=1, limit=0, every=1)
    frames = list(itertools.takewhile(lambda f: f is not None, (c() for c in stack.calls())))
    assert [f.image.shape[0] for f in frames] == [160, 161, 162, 163, 164]
    assert [f.image[0, 0, 0] for f in frames] == [0, 40, 80, 120, 160]
    assert not stack.makes_video and frames[0].seconds is None
    assert problem_of(path) == (5, "")
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.tif").write_bytes(data[: len(data) * 7 // 10])
    number, problem = problem_of(tmp_path / "cut.tif")
    assert 1 <= number < 5 and "cut.tif" in problem


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4", "libvpx-vp9"])
def test_half_a_video_is_counted(tmp_path, codec):
    rng = np.random.default_rng(0)
    codecs = [c for c in CODECS if c[0] == codec]
    writer = VideoWriter(str(tmp_path / "whole"), 10.0, codecs)
    for i in range(60):  # with a pause, which is no damage
        image = rng.integers(0, 255, (64, 64, 3), np.uint8)
        writer.write(image, i / 10 if i < 30 else i / 10 + 2)
    path = Path(writer.close())
    assert problem_of(path) == (60, "")
    data = path.read_bytes()
    half = path.with_stem("half")
    half.write_bytes(data[: len(data) // 2])
    if codec == "mpeg4":  # its table of frames stands at the end
        with pytest.raises(ValueError, match="half.mp4"):
            problem_of(half)
        return
    number, problem = problem_of(half)
    assert 20 < number < 40 and re.search(rf"{number} of \d\d frames were read", problem)


def test_a_video_that_is_a_script_opens_nothing(tmp_path):
    writer = VideoWriter(str(tmp_path / "secret"), 10.0)
    writer.write(np.zeros((32, 32, 3), np.uint8))
    secret = writer.close()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"
    for name, script in (
        ("concat.mp4", "ffconcat version 1.0\nfile 'secret.mp4'\n"),
        ("list.mp4", playlist),
        ("list.ts", playlist),
        ("sdp.mkv", "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"),
    ):
        (tmp_path / name).write_text(script)
        with pytest.raises(ValueError, match=f"{name}: is not a video"):
            VideoReader(str(tmp_path / name))


def test_a_name_like_a_camera_or_an_address_is_a_file_where_one_is(tmp_path, monkeypatch):
    writer = VideoWriter(str(tmp_path / "a"), 10.0)
    writer.write(np.zeros((32, 32, 3), np.uint8))
    os.rename(writer.close(), tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert problem_of("12:30.mp4") == (1, "")
    Image.new("RGB", (8, 6)).save("camera:0", "PNG")
    assert problem_of("camera:0") == (1, "")


def test_what_never_ends_is_not_read(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.mp4")
    (tmp_path / "d.jpg").symlink_to("/dev/zero")
    (tmp_path / "e.png").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "f.png"))
    for text in (str(tmp_path), str(tmp_path / "*.*")):
        sources = open_sources(text, "", threads=1, limit=0, every=1)
        frames = [call() for source in sources for call in source.calls()]
        problems = [f.problem for f in frames if f and f.problem]
        assert len(frames) == 6 and len(problems) == 5
        for kind in ("a FIFO", "a device", "No such file", "a socket"):
            assert any(kind in problem for problem in problems), kind
    with pytest.raises(ValueError, match="c.mp4: is a FIFO"):
        open_sources(str(tmp_path / "c.mp4"), "", threads=1, limit=0, every=1)


def test_bad_videos_are_refused(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    writer = VideoWriter(str(tmp_path / "whole"), 10.0)
    for _ in range(5):
        writer.write(np.zeros((32, 32, 3), np.uint8))
    data = Path(writer.close()).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    why = "(is not a video that|has no pictures|the video has no frame)"
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match=f"{name}: {why}"):
            VideoReader(str(tmp_path / name))
    sound(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match="no pictures in it, only sound"):
        VideoReader(str(tmp_path / "sound.wav"))
    without_frames(tmp_path / "none.mkv")
    with pytest.raises(ValueError, match="has no frame that can be read"):
        VideoReader(str(tmp_path / "none.mkv"))


def sound(path):
    samples = bytes(8000)
    form = (16, 1, 1, 8000, 8000, 1, 8)
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 8036, b"WAVE", b"fmt ", *form)
    path.write_bytes(head + struct.pack("<4sI", b"data", len(samples)) + samples)


def without_frames(path):
    """A video's header with nothing after it."""
    import av

    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()


def test_a_broken_video_among_others_does_not_stop_them(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").touch()
    sources = open_sources(str(tmp_path), "", threads=1, limit=0, every=1)
    frames = [call() for source in sources for call in source.calls()]
    assert [bool(f.problem) for f in frames if f] == [False, True]


def test_frames_beyond_the_pixel_limit_are_refused(tmp_path, monkeypatch):
    writer = VideoWriter(str(tmp_path / "large"), 10.0)
    writer.write(np.zeros((64, 64, 3), np.uint8))
    path = writer.close()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="frames of 64 x 64 have more than 1000"):
        VideoFile(path, Names(), 0, 1)
