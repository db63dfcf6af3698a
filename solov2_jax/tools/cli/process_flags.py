"""The flags by which processes on several hosts join; see docs/distributed.md."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from solov2_jax.distributed import Joining

_MODE = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether this is one of several processes. auto: if Slurm's srun, Open MPI, GKE or "
    "--coordinator says so; on: always, with whatever JAX finds (TPU pods need this).",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, the same for all; '' finds it out."
)
_NUMBER = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_ID = flags.DEFINE_integer("process_id", None, "0, 1, ...; with --coordinator.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a sign of life after which a process counts as dead and the others are ended.",
    lower_bound=5,
)


def joining() -> "Joining":
    """Returns what the flags say."""
    from solov2_jax.distributed import Joining

    return Joining(
        _MODE.value,
        _COORDINATOR.value,
        _NUMBER.value,
        _ID.value,
        _HEARTBEAT.value,
    )
