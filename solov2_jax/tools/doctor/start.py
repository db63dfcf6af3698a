"""The doctor's quick look when training starts: nothing that reads image files."""

import logging
from typing import Any

from solov2_jax.data.coco import CocoDataset
from solov2_jax.io import InputError
from solov2_jax.tools.doctor.data_report import settings_of, spread
from solov2_jax.tools.doctor.findings import ERROR, Finding, share
from solov2_jax.tools.doctor.grids import grid_collisions, grid_findings
from solov2_jax.tools.doctor.limits import limit_findings, training_limit_findings
from solov2_jax.tools.doctor.measure import measure
from solov2_jax.tools.doctor.objects import class_findings, empty_findings, object_findings

log = logging.getLogger(__name__)

# Images whose objects are drawn and measured: about a second.
LIMIT = 200
_SAID = ("annotations dropped", "polygons dropped", "crowd regions", "boxes derived")


def check_at_start(config: Any, train: CocoDataset, val: CocoDataset) -> list[Finding]:
    """Returns what was found, after logging it; raises if training cannot start.

    What was not looked at is logged too.
    """
    settings = settings_of(config)
    indices = spread(len(train), LIMIT)
    objects = measure(train, indices.tolist(), settings.short, settings.max_size)
    collisions = grid_collisions(objects, settings.layout)
    findings = [
        *class_findings(train, val),
        *empty_findings(train, settings.keep_empty),
        # Loading the json has told what it dropped.
        *(f for f in object_findings(train, objects) if not _told(f)),
        *grid_findings(objects, collisions),
        *limit_findings(train, settings.limits),
        *training_limit_findings(train, settings.limits, collisions.pairs),
    ]
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


def _told(finding: Finding) -> bool:
    return any(text in finding.text for text in _SAID)
