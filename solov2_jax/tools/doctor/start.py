"""The doctor's quick look when training starts: nothing that reads image files."""

import logging
from typing import Any

from solov2_jax.data.coco import CocoDataset
from solov2_jax.io import InputError
from solov2_jax.tools.doctor.data_report import examine_objects, settings_of, spread
from solov2_jax.tools.doctor.findings import ERROR, Finding, class_findings, share

log = logging.getLogger(__name__)

# Images whose objects are drawn and measured: about a second.
LIMIT = 200
_SAID = ("annotations dropped", "polygons dropped", "crowd regions", "boxes derived")


def check_at_start(config: Any, train: CocoDataset, val: CocoDataset) -> list[Finding]:
    """Returns what was found, after logging it; raises if training cannot start.

    What was not looked at is logged too.
    """
    indices = spread(len(train), LIMIT)
    _, _, of_objects = examine_objects(train, indices, settings_of(config), training=True)
    # Loading the json has told what it dropped.
    untold = [f for f in of_objects if not any(text in f.text for text in _SAID)]
    findings = class_findings(train, val) + untold
    errors = [f for f in findings if f.level == ERROR]
    if errors:
        raise InputError(
            f"{train.annotation_file}: {'; '.join(f.line() for f in errors)}. "
            "`solov2 doctor` reports all of it."
        )
    for finding in findings:
        log.info("data, %s", finding.line())
    log.info(
        "data: looked at the objects of %s training images and at no image file; "
        "`solov2 doctor` reads them all and draws a page",
        share(len(indices), len(train)),
    )
    return findings
