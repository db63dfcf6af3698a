"""Mutated jsons: every command reads them, or refuses them with one and the same sentence.

SOLOV2_FUZZ_EXAMPLES (100) is the number of mutations of each kind.
"""

import copy
import json
import os
import random

from test_user_reports import SETTINGS, perfect
from tiny_coco import content, write

from solov2_jax.data.coco import load_coco
from solov2_jax.io import InputError, without_controls
from solov2_jax.tools.doctor.data_report import examine, text_report
from solov2_jax.tools.report.results_file import evaluate_files

EXAMPLES = int(os.environ.get("SOLOV2_FUZZ_EXAMPLES", "100"))
ODD = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.0, 1e308, 10**25, -(10**25), float("nan"),
    float("inf"), "", "7", "a.png", "..", "/", "a\0b", "\ud800", "😀", "x" * 300, "NaN", [], [[]],
    [0], [7, 7, 7, 7], [[1, 2, 3]], [[0, 0, 9, 0, 9, 9]], [[[0, 0], [9, 0], [9, 9]]], {}, {"id": 7},
    {"size": [48, 64], "counts": [0]}, {"size": [48, 64], "counts": "0"}, {"counts": None},
    {"size": [10**9, 10**9], "counts": [10**18]}, {"size": [48, 64], "counts": [-5, 5]},
    {"size": ["a", 3], "counts": "zz"}, {"size": None, "counts": []},
]  # fmt: skip


def places(value, path=()):
    """Yields the path of every value within a json."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def mutate(values, rng):
    """Returns a copy in which one to three values are replaced, deleted or repeated."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice([p for p in places(values) if p] or [()])
        if not path:
            return values
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.7:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.85:
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[rng.choice(("id", "extra", "Ü"))] = parent[path[-1]]
    return values


def outcome(read):
    """Returns the message of a refusal, or "" of what is read; anything else is raised."""
    try:
        read()
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        return message
    return ""


def test_mutated_jsons_are_read_or_refused_alike(tmp_path):
    rng = random.Random(0)
    results = tmp_path / "results.json"
    results.write_text("[]")
    images, path = write(tmp_path)
    refused = 0
    for _ in range(EXAMPLES):
        values = mutate(content(), rng)
        write(tmp_path, values)
        training = outcome(lambda: load_coco(images, path))
        evaluation = outcome(lambda: evaluate_files(path, str(results)))
        report = examine((images, path), None, SETTINGS)
        refused += bool(training)
        assert (report.verdict == "error") >= bool(training), (values, training)
        without_controls(text_report(report)).encode()  # can be printed
        if evaluation:  # it needs no image files
            assert evaluation == training, (values, training, evaluation)
            assert path in evaluation
    assert EXAMPLES / 4 < refused < EXAMPLES


def test_mutated_results_are_read_or_refused(tmp_path):
    rng = random.Random(1)
    _, path = write(tmp_path)
    results = tmp_path / "results.json"
    refused = 0
    for _ in range(EXAMPLES):
        results.write_text(json.dumps(mutate(perfect(path), rng)))
        message = outcome(lambda: evaluate_files(path, str(results)))
        refused += bool(message)
        assert not message or str(results) in message
    assert EXAMPLES / 4 < refused < EXAMPLES


def test_mutated_bytes_are_read_or_refused(tmp_path):
    rng = random.Random(2)
    images, path = write(tmp_path)
    data = json.dumps(content()).encode()
    for _ in range(EXAMPLES):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            place = rng.randrange(len(changed))
            new = rng.choice((b"\xff", b"\x00", b"[" * 3000, b'"', b"}", b"\\u", b"9" * 5000, b""))
            changed[place : place + rng.choice((0, 1, 40))] = new
        with open(path, "wb") as file:
            file.write(changed)
        for read in (lambda: load_coco(images, path), lambda: evaluate_files(path, path)):
            message = outcome(read)
            assert not message or path in message
