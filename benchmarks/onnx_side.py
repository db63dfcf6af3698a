"""Worker of ONNX Runtime and OpenVINO: the exported network alone, in float32."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import worker

OUTPUTS = ("cate", "kernel", "mask_feat")


def onnxruntime(case: Path) -> tuple[Any, dict[str, str], int]:
    """Returns (image -> outputs, versions, threads)."""
    import onnxruntime as ort

    threads = len(os.sched_getaffinity(0))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(case / "network.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def infer(image: np.ndarray) -> list[np.ndarray]:
        return session.run(list(OUTPUTS), {name: image})

    return infer, {"onnxruntime": ort.__version__}, threads


def openvino(case: Path) -> tuple[Any, dict[str, str], int]:
    """Returns (image -> outputs, versions, threads)."""
    import openvino as ov

    core = ov.Core()
    # Its default on processors with bfloat16 instructions is to compute in bfloat16.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(str(case / "network.onnx"), "CPU", settings)
    request = model.create_infer_request()
    threads = int(model.get_property("INFERENCE_NUM_THREADS"))

    def infer(image: np.ndarray) -> list[np.ndarray]:
        request.infer([image], share_inputs=True)
        return [request.get_tensor(model.output(name)).data for name in OUTPUTS]

    return infer, {"openvino": ov.__version__}, threads


def network(case: Path, form: str) -> worker.Work:
    """The network alone, from normalised pixels to its raw outputs."""
    infer, versions, threads = {"onnxruntime": onnxruntime, "openvino": openvino}[form](case)
    image = np.load(case / "network_input.npy")
    last: list[Any] = []

    def run() -> None:
        last[:] = [infer(image)]

    about = {
        "versions": {"python": platform.python_version(), **versions},
        "threads": threads,
        "first_call_s": worker.first_call(run),
    }

    def found() -> dict[str, float]:
        means = (float(np.abs(x).mean()) for x in last[0])
        return dict(zip(OUTPUTS, means, strict=True))

    return worker.Work(run, about, found=found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["network"])
    parser.add_argument("--form", choices=["onnxruntime", "openvino"], required=True)
    parser.add_argument("--case", type=Path, required=True)
    arguments = parser.parse_args()
    worker.serve(lambda: network(arguments.case, arguments.form))
