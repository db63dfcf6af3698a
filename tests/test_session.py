"""What notebooks and scripts set up: the log on standard output, kept programs."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from solov2_jax import logging as session
from solov2_jax import set_up

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("solov2_jax")


def test_the_log_is_shown_once_where_print_goes(capsys):
    log.handlers.clear()
    set_up(cache="")
    logging.getLogger("solov2_jax.data").info("before")
    assert capsys.readouterr().out.endswith(" before\n")
    set_up(cache="")
    log.info("after")
    shown = capsys.readouterr()
    assert shown.out.count("after") == 1 and not shown.err
    assert not log.propagate, "a handler of the root's would show it twice"
    logging.getLogger("absl").warning("a library's")
    assert capsys.readouterr() == ("", "")


def test_a_log_that_somebody_hears_is_left_alone(capsys):
    before = list(log.handlers)
    with session.console_logging():  # pytest listens
        assert log.handlers == before
        log.warning("heard")
    assert "heard" not in capsys.readouterr().out


def test_training_shows_its_log_where_none_is_set_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    from solov2_jax import train

    train(toy.toy_config(train__steps=2), tmp_path, toy.toy_task)
    assert "step 2/2" in capsys.readouterr().out
    assert log.handlers == []


@pytest.mark.parametrize("given", ["", "theirs"])
def test_programs_are_kept_in_the_folder_unless_the_environment_names_one(tmp_path, given):
    code = "import jax, solov2_jax\nsolov2_jax.set_up(cache='ours')\njax.jit(lambda x: x + 1)(1)\n"
    clean = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment = {"JAX_COMPILATION_CACHE_DIR": given} if given else {}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={**clean, **environment, "PYTHONPATH": str(ROOT)},
    )
    assert [path.name for path in tmp_path.iterdir()] == [given or "ours"]
