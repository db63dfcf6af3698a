"""Distributed initialisation: how processes find each other, by flags or by what the
cluster sets in the environment.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from solov2_jax.io import InputError

log = logging.getLogger("solov2_jax")


@dataclass(frozen=True)
class Joining:
    """How processes find each other; JAX detects what is left empty.

    Attributes:
      mode: "auto", "on" or "off".
      coordinator: host:port of process 0.
      heartbeat_timeout: seconds without a sign of life after which a process is dead.
    """

    mode: str = "auto"
    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 100


def find_cluster(environment: Mapping[str, str]) -> str:
    """Returns what says that this process is one of several, "" if nothing does.

    Only what tells it without a question to anyone: a single process must not wait for
    others that nobody has started.
    """

    def number(name: str) -> int:
        return int(environment.get(name, "1"))

    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    # Of a job step, which srun starts: a batch script is a single process.
    if "SLURM_STEP_NODELIST" in environment and number("SLURM_STEP_NUM_TASKS") > 1:
        return "Slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if any("," in environment.get(name, "") for name in names):
        return "TPU hosts of GKE"
    return ""


def initialize(joining: Joining) -> bool:
    """Returns whether this process is one of several, and connects it to them.

    To be called before the first use of a device.

    Raises:
      InputError: where the settings are incomplete, or nobody answers.
    """
    ids = (joining.num_processes, joining.process_id)
    has_ids = any(x is not None for x in ids)
    if joining.mode == "off" and (joining.coordinator or has_ids):
        raise InputError(
            "--distributed=off contradicts --coordinator, --num_processes and --process_id"
        )
    if joining.coordinator and None in ids:
        raise InputError("--coordinator needs --num_processes and --process_id (0, 1, ...) too")
    cluster = "--coordinator" if joining.coordinator else find_cluster(os.environ)
    if joining.mode == "off" or (joining.mode == "auto" and not cluster):
        if has_ids:
            raise InputError(
                "--num_processes and --process_id need --coordinator=HOST:PORT, the "
                "address of process 0"
            )
        return False
    # JAX would take over SIGTERM, also before there is anything to save.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            joining.coordinator or None,
            joining.num_processes,
            joining.process_id,
            heartbeat_timeout_seconds=joining.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes did not find each other ({cluster or 'by --distributed=on'}):"
            f" {' '.join(str(error).split())[:300]}. Give --coordinator, "
            "--num_processes and --process_id, or --distributed=off for one process"
        ) from error
    log.info(
        "process %d of %d, found by %s: %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        cluster or "--distributed=on",
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].platform,
    )
    return True
