"""One atomic write and one boundary around the reading of other people's files."""

import json
import logging
import os
import pathlib
import stat
import zlib

import pytest

from solov2_jax import io
from solov2_jax.logging import PlainFormatter
from solov2_jax.tools.cli import app


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    io.write_json({"a": 1}, path)
    with pytest.raises(RuntimeError), io.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_file_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "usual").write_text("")
    io.write_text("a", tmp_path / "ours")
    modes = {stat.S_IMODE(os.stat(p).st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_name_of_full_length_can_be_written(tmp_path):
    name = "a" * 250 + ".json"
    io.write_json([], tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        io.write_text("", tmp_path / "nowhere" / "x.txt")


@pytest.mark.parametrize(
    "error",
    [zlib.error("bad"), RecursionError("deep"), OverflowError(), KeyError("x"), EOFError()],
)
def test_whatever_a_library_raises_names_the_file(error):
    with pytest.raises(io.InputError, match=r"x\.bin: cannot be read as a thing .*Write it anew"):
        with io.reading("x.bin", "a thing", "Write it anew"):
            raise error


def test_our_own_message_passes_unchanged():
    with pytest.raises(io.InputError, match="^complete$"), io.reading("x", "a thing"):
        raise io.InputError("complete")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    path: pathlib.Path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert io.read_json(path, "a list") == [1]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"{", "JSONDecodeError"), (b"[" * 200_000, "RecursionError"), (b"\xff", "Unicode")],
)
def test_damaged_json_is_one_sentence(tmp_path, content, why):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(io.InputError, match=rf"x\.json: cannot be read as a list \({why}"):
        io.read_json(path, "a list")


def test_what_a_terminal_would_obey_is_left_out_of_logs(tmp_path, capsys):
    name = "cat\x1b[2J\ud800\x07 \u202e\xfc"
    assert io.without_controls(f"a\n\t{name}") == "a\n\tcat[2J \xfc"
    record = logging.LogRecord("x", logging.INFO, "", 0, "class %s", (name,), None)
    assert PlainFormatter("%(message)s").format(record) == "class cat[2J \xfc"
    app.echo(name)
    assert capsys.readouterr().out == "cat[2J \xfc\n"
