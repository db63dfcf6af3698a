"""Records hold what the COCO folder holds, and are read without TensorFlow or TFDS."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_coco import annotation, content, encode_mask, write

from configs import base
from solov2_jax.config import load_config
from solov2_jax.data import build, records
from solov2_jax.data.coco import load_coco
from solov2_jax.data.images import read_image
from solov2_jax.tools.tfds import examples, main

ROOT = Path(__file__).resolve().parent.parent


def values() -> dict:
    """Polygons, run lengths and a crowd."""
    mask = np.zeros((64, 48), bool)
    mask[5:30, 7:40] = True
    data = content()
    data["annotations"] += [
        annotation(4, 3, 5, bbox=[7, 5, 33, 25], segmentation=encode_mask(mask)),
        annotation(5, 7, 5, iscrowd=1),
    ]
    return data


def run(script: str, *, blocked: str) -> subprocess.CompletedProcess:
    """Runs a script in which a package is not installed."""
    start = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hide(name, *place):
    return None if name.partition(".")[0] == {blocked!r} else find(name, *place)
PathFinder.find_spec = hide
"""
    return subprocess.run(
        [sys.executable, "-c", start + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def arguments(images: str, path: str, output: Path, name: str = "tiny") -> list[str]:
    data = [f"--images={images}", f"--annotations={path}"]
    data += [f"--val_images={images}", f"--val_annotations={path}"]
    return [f"--name={name}", f"--output={output}", *data]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, str, Path]:
    """Returns image folder, json, and the folder of the records made of them."""
    folder = tmp_path_factory.mktemp("tfds")
    images, path = write(folder, values())
    command = arguments(images, path, folder / "out")
    script = f"from solov2_jax.tools.tfds import examples, main\nmain({command})"
    done = run(script, blocked="tensorflow")
    assert done.returncode == 0, done.stderr
    assert "--config.data.name=tfds:" in done.stdout
    return images, path, folder / "out" / "tiny" / "1.0.0"


def config_of(workers: int = 0):
    config = base.get_config()
    config.input.min_sizes_train, config.input.max_size_train = (32, 40), 64
    config.input.min_size_test = config.input.max_size_test = 64
    config.train.steps, config.train.batch_size = 4, 2
    config.data.num_workers = workers
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_folder(built, monkeypatch, workers):
    images, path, folder = built
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    plain, packed = config_of(), config_of(workers)
    for split in (plain.data.train, plain.data.val):
        split.images, split.annotations = images, path
    packed.data.name = f"tfds:{folder}"
    (train, val), (again, val_again) = map(build.load_datasets, (plain, packed))
    for first, second in (
        (
            build.build_train_batches(plain, train),
            build.build_train_batches(packed, again),
        ),
        (
            build.build_eval_batches(plain, val),
            build.build_eval_batches(packed, val_again),
        ),
    ):
        for a, b in zip(first, second, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])
    assert again.annotation_file == f"{folder}/instances_train.json"
    # Evaluation draws from it too.
    np.testing.assert_array_equal(read_image(again.path(1)), read_image(train.path(1)))


def test_tfds_reads_the_same_objects(built):
    _, path, folder = built
    script = f"""
import json
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(folder)!r}).as_data_source("train")
def plain(v):
    return v.decode() if isinstance(v, bytes) else v.tolist()
rows = []
for example in source:
    image = example.pop("image")
    columns = example.pop("objects")
    objects = [dict(zip(columns, row)) for row in zip(*columns.values())]
    rows.append(example | {{"objects": objects, "shape": image.shape}})
print(json.dumps(rows, default=plain))
"""
    done = run(script, blocked="tensorflow")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    data = json.loads(Path(path).read_text())
    assert [r["image/id"] for r in rows] == [7, 3, 9]
    assert [r["image/file_name"] for r in rows] == ["a.png", "sub/b.png", "c.png"]
    assert [r["shape"][:2] for r in rows] == [[48, 64], [64, 48], [40, 40]]
    objects = {o["id"]: o for r in rows for o in r["objects"]}
    assert sorted(objects) == [1, 2, 3, 4, 5]
    for record in data["annotations"]:
        found = objects[record["id"]]
        assert found["bbox"] == record["bbox"]
        assert found["category_id"] == record["category_id"]
        assert found["label"] == {5: 0, 20: 1}[record["category_id"]]
        assert found["is_crowd"] == bool(record["iscrowd"])
    assert objects[4]["mask"] == data["annotations"][3]["segmentation"]["counts"]
    square = np.zeros((64, 48), bool)
    square[8:28, 10:30] = True
    assert objects[1]["mask"] == encode_mask(square)["counts"]


def test_one_error_for_each_mistake(built, tmp_path, capsys):
    images, path, folder = built

    def fails(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        assert stop.value.code == 2
        return capsys.readouterr().err

    said = fails(*arguments(images, path, folder.parent.parent))
    assert "tiny/1.0.0 exists; remove it" in said
    assert "--name My-Set: use lower-case" in fails(*arguments(images, path, tmp_path, "My-Set"))
    other = tmp_path / "moved"
    shutil.copytree(folder, other)
    shorter = values()
    shorter["images"].pop()
    json_file = other / "instances_train.json"
    json_file.write_text(json.dumps(shorter))
    root, _ = records.split_root(f"tfds:{other}", "train")
    with pytest.raises(ValueError, match="train have 3 images, the json beside them 2"):
        load_coco(root, str(json_file))
    swapped = values()
    swapped["images"][0]["file_name"] = "z.png"
    json_file.write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match="record 0 of train is 'a.png', .* 'z.png'"):
        read_image(load_coco(root, str(json_file)).path(0))
    with pytest.raises(ValueError, match="has 0 of the array_record shards of train"):
        load_coco(f"tfds:{tmp_path}#train", str(json_file))
    with pytest.raises(ValueError, match="no such annotation file"):
        build.load_coco(*records.split_root(f"tfds:{tmp_path}", "train"))


def test_the_extra_is_named_where_it_is_missing(built, tmp_path):
    images, path, _ = built
    command = arguments(images, path, tmp_path)
    script = f"from solov2_jax.tools.tfds import examples, main\nmain({command})"
    done = run(script, blocked="tensorflow_datasets")
    assert done.returncode == 2
    assert 'pip install "solov2_jax[tfds]"' in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_damaged_shards_are_named(built, tmp_path, damage):
    folder = tmp_path / damage
    shutil.copytree(built[2], folder)
    (shard,) = folder.glob("*-train.array_record*")
    data = shard.read_bytes()
    noise = data[:100] + bytes(200) + data[300:]
    shard.write_bytes({"half": data[: len(data) // 2], "empty": b"", "noise": noise}[damage])
    with pytest.raises(ValueError, match="(train.array_record|record 0 of train).*Build the rec"):
        dataset = load_coco(*records.split_root(f"tfds:{folder}", "train"))
        read_image(dataset.path(0))


def test_ids_that_fit_nowhere_are_places(tmp_path):
    data = values()
    for record in (*data["images"], *data["annotations"]):
        key = "id" if "file_name" in record else "image_id"
        record[key] += 2**64
    for record in data["annotations"]:
        record["id"] = f"f3-{record['id']}"
    rows = list(examples(load_coco(*write(tmp_path, data))))
    assert [r["image/id"] for r in rows] == [0, 1, 2]
    assert sorted(o["id"] for r in rows for o in r["objects"]) == [0, 1, 2, 3, 4]


def test_a_damaged_record_is_an_error():
    with pytest.raises(ValueError, match="cut off"):
        records.parse_example(b"\x0a\x10abc")
    with pytest.raises(ValueError, match="no tf.train.Example"):
        records.parse_example(b"\x08\x01")
    assert records.parse_example(b"") == {}


def test_the_config_takes_a_folder_of_records():
    file = str(ROOT / "configs" / "base.py")
    config = load_config(file, ["--config.data.name=tfds:some/where"])
    assert config.data.name == "tfds:some/where"
    with pytest.raises(ValueError, match="must be one of .*tfds:FOLDER"):
        load_config(file, ["--config.data.name=records"])
