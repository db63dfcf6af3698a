"""What a change must pass; `.ci/run` and the public workflow run these sessions.

    nox -l                     # the sessions
    nox -s lint types          # some of them
    nox -s tests -- tests/test_cli.py -x

Environments are made from requirements.txt and requirements-dev.txt; with `--no-venv` the
sessions run in the one that is there. `tests_newest` is the newest Python of this machine
with the newest JAX; `wheel` is the built package as its user gets it; `ahead` compiles for
devices that are not here.
"""

import shutil
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

nox.options.sessions = ["lint", "types", "docs", "tests", "tests_newest"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"

NEWEST = next(
    (v for v in ("3.14", "3.13", "3.12") if shutil.which(f"python{v}")), "the newest Python"
)
# What `tests_newest` runs: files whose code depends on versions, without the slowest. The
# others run in `tests`, on its Python only.
VERSION_BOUND = (
    "test_augment test_bfloat16 test_checkpoint test_cli test_coco test_coco_score "
    "test_config test_config_schema test_crops test_custom_augment test_export test_flow "
    "test_heatmaps test_hooks test_io test_keypoints test_losses test_masks test_onnx_rules "
    "test_ops test_outputs test_pipeline test_sampling test_schedule test_state_dicts "
    "test_summary test_targets test_trace test_train_step test_transforms "
    "test_transport test_weights_convert test_weights_formats test_weights_names "
    "test_workers test_writers"
).split()


# Two processes, a file in one of them: a file compiles its programs once.
TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")


def install(session: nox.Session) -> None:
    """Installs the tested versions and the package itself, as a newcomer would."""
    if isinstance(session.virtualenv, PassthroughEnv):
        return
    pip = ("--quiet", "--disable-pip-version-check")
    session.install(*pip, "-r", "requirements.txt", "-r", "requirements-dev.txt")
    session.install(*pip, "--no-deps", ".")
    session.run("python", "-m", "pip", "check", *pip[1:])


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, import order, formatting; the dev requirements' ruff."""
    if not isinstance(session.virtualenv, PassthroughEnv):
        lines = Path("requirements-dev.txt").read_text().splitlines()
        session.install("--quiet", *(line for line in lines if line.startswith("ruff==")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, by pyright."""
    install(session)
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's site; a warning is an error."""
    install(session)
    session.run(
        "python", "docs/site_pages.py", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"}
    )


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that are not marked slow, and the installed commands."""
    install(session)
    check_installed(session)
    session.run("pytest", *(session.posargs or TWO_PROCESSES))


@nox.session(python=NEWEST)
def tests_newest(session: nox.Session) -> None:
    """The tests that depend on versions, on the newest Python and JAX."""
    install(session)
    check_installed(session)
    files = [f"tests/{name}.py" for name in VERSION_BOUND]
    session.run("pytest", *(session.posargs or (*TWO_PROCESSES, *files)))


@nox.session(python="3.11")
def ahead(session: nox.Session) -> None:
    """What programs hold that are compiled for a GPU and a TPU that are not here; an hour."""
    install(session)
    session.install("--quiet", "--no-deps", "-r", "benchmarks/ahead.txt")
    session.run("pytest", "-m", "ahead", *(session.posargs or ["tests/test_ahead.py"]))


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds the package, checks its description, and runs every command of the wheel."""
    session.install("--quiet", "build", "twine")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), ".", silent=True)
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    session.run("bash", ".ci/wheel", str(next(dist.glob("*.whl"))), external=True)


def check_installed(session: nox.Session) -> None:
    """The installed package finds its configs and commands outside of the sources."""
    folder = session.create_tmp()
    with session.chdir(folder):
        session.run(
            "python", "-c", "from solov2_jax.config import load_config as f; f('quickstart')"
        )
        session.run("solov2", "--version")
        for command in ("train", "evaluate", "predict", "export", "convert", "serve"):
            session.run(f"solov2-{command}", "--help", silent=True)
