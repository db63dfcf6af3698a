"""What the documents name exists: functions, files, config keys, links."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from configs import base
from solov2_jax.config import flatten

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MAP = ROOT / "docs" / "from_detectron2.md"
EXTERNAL = {"jax", "optax", "tx"}  # named for what they do, not for where it is
KEYS = flatten(base.get_config())


def code(text: str) -> list[str]:
    """Returns what stands in single backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def is_key(name: str) -> bool:
    return any(k == name or k.startswith(name.rstrip("*")) for k in KEYS)


def resolves(name: str) -> bool:
    """Returns whether a dotted name below solov2_jax is a module, or in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath("solov2_jax", *parts[:end])
        files = [path.with_suffix(".py"), path / "__init__.py"]
        file = next((f for f in files if f.is_file()), None)
        if file:
            return defines(ast.parse(file.read_text()), parts[end:])
    return False


def defines(scope: ast.AST, names: list[str]) -> bool:
    """Returns whether names[0] is bound in a module or class, names[1] inside it..."""
    if not names:
        return True
    for node in getattr(scope, "body", []):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == names[0]:
            return defines(node, names[1:])
        bound = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and names[0] in bound:
            return len(names) == 1
        if isinstance(node, ast.ImportFrom):
            if names[0] in {alias.asname or alias.name for alias in node.names}:
                return len(names) == 1
    return False


def table_cells(text: str, column: int) -> list[str]:
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [row.split(" | ")[column] for row in rows if row.count(" | ") >= 2]


def test_names_on_the_right_exist():
    wrong = []
    for cell in table_cells(MAP.read_text(), 1):
        for name in code(cell):
            if not re.match(r"[a-z]\w*\.[\w.*]+", name):
                continue
            name = name.split("(")[0].split()[0]
            known = is_key(name) or (ROOT / name).is_file() or resolves(name)
            if not known and name.split(".")[0] not in EXTERNAL:
                wrong.append(name)
    assert not wrong, f"{MAP.name} names what does not exist: {wrong}"


def test_what_a_debugger_meets_is_in_the_map():
    """On the way through AdelaiDet's train_net.py and demo.py, in this order."""
    met = """
        default_argument_parser launch main Trainer DefaultTrainer TrainerBase
        trainer.train() train_loop before_step run_step after_step R50_3x.yaml
        Base-SOLOv2.yaml adet/config/defaults.py CfgNode setup_logger
        auto_scale_workers get_world_size build_model build_optimizer
        build_train_loader create_ddp_model SimpleTrainer AMPTrainer
        build_lr_scheduler DetectionCheckpointer start_iter max_iter register_hooks
        build_hooks MultiStepParamScheduler WarmupParamScheduler
        CompositeParamScheduler ConstantParamScheduler LinearParamScheduler
        hooks.IterationTimer hooks.LRScheduler hooks.PreciseBN
        hooks.PeriodicCheckpointer hooks.EvalHook test_and_save_results
        hooks.PeriodicWriter build_writers EventStorage self.model.training
        _data_loader_iter data_time loss_dict zero_grad backward _write_metrics
        optimizer.step() F.conv2d SOLOv2.__init__ build_backbone SOLOv2.forward
        preprocess_image gt_instances split_feats ins_head mask_head SOLOv2InsHead
        head_configs cate_tower kernel_tower cate_pred kernel_pred GroupNorm linspace
        meshgrid F.interpolate SOLOv2MaskHead convs_all_levels feature_add_all_level
        conv_pred get_ground_truth get_ground_truth_single loss dice_loss
        AdetCheckpointer Trainer.test build_evaluator builtin.py inference_on_dataset
        evaluator.reset process(inputs text_evaluation.py instances_to_coco_json
        build_resnet_backbone BACKBONE_REGISTRY build_resnet_fpn_backbone BasicStem
        CNNBlockBase BottleneckBlock shortcut conv1 conv2 conv3 make_stage
        FrozenBatchNorm2d build_detection_train_loader DatasetMapperWithBasis
        FCPoseDatasetMapper HeatmapGenerator GT_HEATMAP_STRIDE FCPOSE_ON
        run_on_image DefaultPredictor self.model([inputs])[0] SOLOv2.inference
        inference_single_image
    """
    quoted = " ".join(code(MAP.read_text("utf-8")))
    missing = [name for name in met.split() if name not in quoted]
    assert not missing, f"{MAP.name} lacks {missing}"


def test_every_config_key_is_in_the_map():
    named = code(MAP.read_text().split("## Keys of the configuration")[1])
    missing = [
        key
        for key in KEYS
        if not any(key == n or (n[-1] == "*" and key.startswith(n[:-1])) for n in named)
    ]
    assert not missing, f"{MAP.name} lacks {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_and_links_exist(path):
    text = path.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, flags=re.M)
    }
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        if file and not (path.parent / file).exists():
            wrong.append(target)
        if not file and anchor not in anchors:
            wrong.append(target)
    if path.name == "CHANGELOG.md":  # old names are left in its tables, and in "Deleted"
        text = "\n".join(re.findall(r"^\| .* \| (.*) \|$", text, flags=re.M))
    for name in code(text):
        pattern = r"(configs|docs|tests|solov2_jax|benchmarks)/[\w/]+\.(py|md|json|npz)"
        if re.fullmatch(pattern, name) and not (ROOT / name).is_file():
            wrong.append(name)
    assert not wrong, f"{path.name} points to what does not exist: {wrong}"


def test_a_wrong_name_is_found():
    assert resolves("targets.assign_targets") and resolves("models.build_model")
    assert resolves("training.hooks.HookBase.after_step")
    assert not resolves("targets.assign") and not resolves("models.nothing.Model")
    assert is_key("data.generated.*") and not is_key("optim.rate")


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *sum(project["optional-dependencies"].values(), []),
    ]
    names = {re.split(r"[\[<>=]", want)[0] for want in wanted}
    lines = (ROOT / "docs" / "dependencies.md").read_text().splitlines()
    given = [line.split("|")[1] for line in lines if line.startswith("| ")]
    assert names <= {name.strip() for cell in given for name in cell.split(",")}
