"""Users' files that once went wrong, through the commands: a line for each of them.

    python tests/reported_cases.py CASES [--only REGEX]

CASES is a folder with a folder for each case. A line has the case, the command, the
right answer, and ok or FAULT with what happened instead. Exit code 1: a fault.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one command
# Returns what is wrong with what a command said or wrote, or "".
Check = Callable[[str, Path], str]


@dataclass(frozen=True)
class Case:
    """A command on a case's files, and its right answer.

    `{case}`, `{out}` and `{run}` stand in the command for the case's folder, an empty
    folder, and the folder of a run with a small network.
    """

    name: str
    command: str
    right: str  # a regular expression in what is printed or written as json or text
    code: int = 0
    check: Check | None = None


TINY = """
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.name = ""
    config.model.fpn.channels = config.model.mask_head.channels = 32
    config.model.ins_head.num_convs = 1
    config.model.ins_head.channels = config.model.ins_head.num_kernels = 32
    config.train.batch_size, config.train.steps = 2, 2
    config.optim.warmup_steps, config.optim.milestones = 1, ()
    config.train.writers = ()
    config.input.min_sizes_train = (64,)
    config.input.max_size_train = config.input.max_size_test = 96
    config.input.min_size_test = 64
    return config
"""
START, TRAINED = "training may start", "saving the checkpoint of step 2.*best segm/AP so far"
SPELLING = "file names found with other separators, without %20 escapes"
PERFECT = "segm/AP 1.0000"
# json: what the doctor says, what training says, the AP of its results file ("": it has none).
JSONS = {
    "a1_crowd/all": ("8 of 8 annotations have iscrowd 1", "annotations have iscrowd 1", ""),
    "a1_crowd/most": ("6 of 8 annotations have iscrowd 1", TRAINED, ""),
    "a2_via/via": (START, TRAINED, ""),
    "a3_flat/flat": (START, TRAINED, PERFECT),
    "a4_nested/nested": (START, TRAINED, PERFECT),
    "a5_backslash/win": (SPELLING, f"{SPELLING}.*{TRAINED}", ""),
    "a8_null/iscrowd_null": (START, TRAINED, PERFECT),
    "a8_null/bbox_null": ("8 boxes derived", TRAINED, PERFECT),
    "a8_null/id_null": (START, TRAINED, PERFECT),
    "a8_null/id_text": (START, TRAINED, PERFECT),
    "a9_hash/hash": (START, TRAINED, PERFECT),
    "a12_bom/bom": (START, TRAINED, PERFECT),
    "a13_nfd/nfc": (SPELLING, f"{SPELLING}.*{TRAINED}", ""),
    "a13_nfd/percent": (SPELLING, f"{SPELLING}.*{TRAINED}", ""),
    "e1_many/many": (
        "set test.max_per_image=150",
        "set targets.max_pairs=204",
        "objects of one class, up to 150",
    ),
    "e4_empty/empty": ("no object to train on", "no object to train on", "AP is undefined"),
    "p1_tiff/upright": ("images are rotated by their EXIF tag", TRAINED, ""),
    "t1_one/one": (START, TRAINED, ""),
}
# What torch.compile, DistributedDataParallel, Lightning and averaged models put before
# the names of weights.
PREFIXES = ("_orig_mod.module.", "module._orig_mod.", "module.module.", "ema_model.module.")
REFUSED = {"a1_crowd/all", "e4_empty/empty"}  # by doctor and training


def json_cases() -> Iterator[Case]:
    """Yields what doctor, training, the record builder and evaluation make of each json."""
    for path, (doctor, training, metrics) in JSONS.items():
        name = path.split("/")[0]
        bad = path in REFUSED
        files, values = "{case}/images", "{case}/" + path.split("/")[1] + ".json"
        data = f"--images {files} --annotations {values}"
        yield Case(path, f"doctor --config {{out}}/../tiny.py {data}", doctor, int(bad))
        keys = [f"--config.data.{part}" for part in ("train", "val")]
        data = " ".join(f"{key}.images={files} {key}.annotations={values}" for key in keys)
        train = "train --config {out}/../tiny.py --workdir {out}/run --cpu_devices 1 "
        yield Case(path, train + data, training, 2 * bad)
        if metrics:
            results = "perfect" if name == "e1_many" else "results"
            evaluate = f"evaluate --annotations {values} --predictions {{case}}/{results}.json"
            yield Case(path, evaluate, metrics)
    data = "--images {case}/images --annotations {case}/hash.json"
    records = data + " " + data.replace("--", "--val_")
    yield Case("a9_hash", "tfds --name ids --output {out} " + records, r'"shardLengths": \[\s*"4"')
    many = "evaluate --annotations {case}/many.json --predictions {case}/perfect.json"
    many += " --output {out} --max_detections 150"
    yield Case("e1_many", many, r'"segm/AP@150": 1\.0')
    empty = "--annotations {case}/empty.json --predictions {case}/none.json --output {out}"
    yield Case("e4_empty", "evaluate " + empty, r'"segm/AP": null')
    data = "--config.data.train.images={case}/../t1_one/images"
    data += " --config.data.train.annotations={case}/../t1_one/one.json"
    data += " --config.data.val.images={case}/images"
    data += " --config.data.val.annotations={case}/empty.json"
    data += " --config.train.eval_every=1 --config.train.patience=1 --config.train.steps=4"
    train = "train --config {out}/../tiny.py --workdir {out}/run --cpu_devices 1 "
    yield Case("e4_empty", train + data, "AP is undefined.*step 4", check=no_best)


def no_best(printed: str, out: Path) -> str:
    return "an undefined AP became the best" if (out / "run" / "best.json").exists() else ""


def results_of(out: Path) -> dict[str, list]:
    """Returns the predictions of each file."""
    by_file: dict[str, list] = {}
    for result in json.loads((out / "predictions.json").read_text()):
        by_file.setdefault(result.pop("file_name"), []).append(result)
    return by_file


def same_as_8_bits(printed: str, out: Path) -> str:
    found = results_of(out)
    scores = {name: [r["score"] for r in results] for name, results in found.items()}
    other = [n for n in ("twelve.png", "twelve.tif") if scores[n] != scores["eight.png"]]
    return f"other scores than at 8 bits: {other}" if other else ""


def upright(printed: str, out: Path) -> str:
    sizes = {n: r[0]["segmentation"]["size"] for n, r in results_of(out).items()}
    wrong = {n: s for n, s in sizes.items() if s != ([96, 128] if n == "a [x].png" else [128, 96])}
    return f"sizes {wrong}" if wrong else ""


def times(*seconds: float) -> Check:
    """Returns a check that results and video have these times at frames 0, 9/2, last."""

    def check(printed: str, out: Path) -> str:
        import av

        in_json = sorted({r["time"] for rs in results_of(out).values() for r in rs})
        with av.open(str(next(out.glob("*.mp4")))) as video:
            shown = [float(f.time or 0) for f in video.decode(video=0)]
        for what, values in (("json", in_json), ("video", shown)):
            wrong = [s for s in seconds if not any(abs(v - s) < 0.02 for v in values)]
            if wrong:
                return f"{what} has no frame at {wrong} s: {values}"
        return ""

    return check


PREDICT = "predict --workdir {run} --cpu_devices 1 --score 0 --output {out} --input {case}"
YOLO = "import yolo --data {case}/data.yaml --output {out}/o.json"
CASES = (
    *json_cases(),
    Case("p1_tiff", PREDICT + "/images/train", "4 pictures", check=upright),
    Case("e1_many", PREDICT + "/images", "raise it by --config.test.max_per_image=N"),
    Case("p1_tiff", YOLO, r'("height": 128.*){4}"segmentation": \[\[9.6, 12.8, 48.0, 12.8'),
    Case("p1_mixed", PREDICT + " --shapes 2", "2 pictures", check=upright),
    Case("p1_mixed", PREDICT + "/t.tif --write yolo,labelme", r'"imageHeight": 128'),
    Case("p2_16bit", PREDICT, "taken as 12 bits, not 16", check=same_as_8_bits),
    Case("v1_vfr", PREDICT + "/vfr.mp4", "20 pictures", check=times(0, 0.9, 4.0, 4.9)),
    Case("v4_gif", PREDICT + "/pauses.gif", "6 pictures", check=times(0, 0.2, 2.2, 2.4)),
    Case("y7_jfif", PREDICT + "/images/train", r"c\.jfif"),
    Case("y7_jfif", YOLO, r"c\.jfif"),
    Case(
        "m1_together",
        "import masks --images {case} --objects {case} --names red --output {out}/o.json",
        r"im0\.jpg.*im1\.jpg(?!.*\.png)",
    ),
    Case("y1_roboflow", YOLO, "2 images .* 4 objects"),
    Case("y1_roboflow", YOLO + " --split val", "2 images .* 4 objects"),
    Case("y2_cvat", YOLO, "2 images .* 4 objects"),
    Case("y4_decimal", YOLO, "1 images .* 2 objects"),
    Case("y8_yes", YOLO, r'"name": "yes".*"name": "no"'),
    Case("y9_ipynb", YOLO, "1 images .* 2 objects"),
    Case("y9_mac", YOLO, "1 images .* 2 objects"),
    Case("l4_ipynb", "import labelme --images {case} --output {out}/o.json", "1 images .* 1 obj"),
    Case("l4_mac", "import labelme --images {case} --output {out}/o.json", "1 images .* 1 obj"),
    *(
        Case(
            "weights",
            f"convert --input {{out}}/../{number}.safetensors --output {{out}}/o.safetensors",
            "leaves|arrays",
        )
        for number in range(len(PREFIXES))
    ),
)


def fault(case: Case, cases: Path, scratch: Path) -> str:
    """Returns what a case's command did instead of the right thing, or ""."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        out = Path(name)
        places = {"case": cases / case.name.split("/")[0], "out": out, "run": scratch / "run"}
        # Split first: a folder's name may have spaces.
        words = [word.format(**places) for word in case.command.split()]
        result = subprocess.run(
            [sys.executable, "-m", "solov2_jax", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        printed = result.stdout + result.stderr
        if "Traceback" in printed or result.returncode != case.code:
            return f"exit code {result.returncode}: {printed.strip()[-300:]}"
        written = [p.read_text() for s in ("json", "txt") for p in sorted(out.glob(f"**/*.{s}"))]
        if not re.search(case.right, "\n".join([printed, *written]), re.DOTALL):
            return f"not said: {printed.strip()[-300:]}"
        return case.check(printed, out) if case.check else ""


def write_network(scratch: Path) -> None:
    """Writes the training config, a run with a small network, and weights with prefixes."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    import numpy as np
    import tiny_network
    from checkpoint_files import small_state
    from safetensors.numpy import save_file

    jax.config.update("jax_platforms", "cpu")
    (scratch / "tiny.py").write_text(TINY)
    config = tiny_network.tiny_config()
    config.input.buckets_test = ((96, 128),)  # one program for all pictures
    tiny_network.write_workdir(scratch / "run", config)
    for number, prefix in enumerate(PREFIXES):
        state = {
            prefix + name: np.asarray(array) for name, array in small_state("r18_light").items()
        }
        save_file(state, scratch / f"{number}.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--only", default="", help="cases and commands that match")
    args = parser.parse_args()
    faults, tried = 0, 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "cache"))
        write_network(scratch)
        for case in CASES:
            if not re.search(args.only, f"{case.name} {case.command}"):
                continue
            start = time.monotonic()
            wrong = fault(case, args.cases.resolve(), scratch)
            tried, faults = tried + 1, faults + bool(wrong)
            command = " ".join(case.command.split()[:2])
            right = case.right.replace(".*", " ... ")[:60]
            seconds = time.monotonic() - start
            what = f"FAULT: {wrong}" if wrong else "ok"
            print(f"{case.name} | {command} | {right} | {what} ({seconds:.1f} s)", flush=True)
    print(f"{tried} commands on reported cases, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
