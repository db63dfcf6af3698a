"""Which of a checkpoint's tensors are the network, and their names without wrappers.

Training programs wrap a network: torch.compile puts "_orig_mod." before its names,
DistributedDataParallel "module.", Lightning what the user called the attribute ("model.",
"net."), averaging "ema_model." or "module." beside "n_averaged"; and the state dict lies
under keys of a checkpoint. Nesting and prefixes, in any order and number, are the same
thing here: a label such as "state_dict.model". The tensors of one label that the tables of
`names` know are the network; several such labels are an error that lists them, unless all
but one are moving averages.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from solov2_jax.weights import names, tables
from solov2_jax.weights.array_files import WeightsError

OURS = "solov2_jax"
NO_RULE = "no rule for this name"
_AVERAGE = "moving average (EMA) of the weights"
_OPTIMISER = "optimiser state"
_SCHEDULE = "learning-rate schedule"
_EXTRAS = (
    (OURS, "read as settings"),
    (r".*optim.*|adamw?|sgd", _OPTIMISER),
    (r"(.*[_.])?(ema|swa|avg)([_.].*)?|.*average.*", _AVERAGE),
    (r".*sched.*", _SCHEDULE),
    (r"(.*[_.])?teacher", "copy of the network that taught it"),
    (r"structuredtoparametername@@", "Paddle's own names"),
    (r"iteration|epoch|message_hub|meta|args|.*scaler|amp.*|loops?|callbacks", "run state"),
    (r"steps?|global_step|n_averaged|num_updates|initted|decay", "run state"),
)
# Wrappers anywhere in a name; no layer of a known network is called so.
_INNER = ("_orig_mod", "module", "_forward_module")
_INNER += ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Wrappers before a name.
_OUTER = re.compile(
    r"(\w+_)?(model|network|ema|swa|average|averaged|avg|student|teacher|detector)(_\w+)?"
    r"|\w*net(_\w+)?|(?!solov2_head$)solo\w*|state_dict"
)
_STATES = ("model", "state_dict", "model_state_dict", "blobs")
_DEPTH = 4  # of dicts in dicts


@dataclass
class _Group:
    """The tensors below one label, by their names without it."""

    path: tuple[str, ...]  # of the state dict in the checkpoint
    wrappers: str
    tensors: dict[str, Any] = field(default_factory=dict)
    full_names: dict[str, str] = field(default_factory=dict)
    num_known: int = 0

    @property
    def label(self) -> str:
        """The path and the wrappers; not kept, because paths may be long."""
        return ".".join(filter(None, (*self.path, self.wrappers)))


@dataclass(frozen=True)
class StateDict:
    """The network's tensors, what was left out and why, and the checkpoint's rest."""

    tensors: dict[str, Any]
    dropped: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(1024)
def why_left_out(key: str) -> str | None:
    """Returns what a checkpoint's entry is, if it is no network."""
    reasons = (text for pattern, text in _EXTRAS if re.fullmatch(pattern, key, re.IGNORECASE))
    return next(reasons, None)


def split_wrappers(name: str) -> tuple[str, str]:
    """Returns (wrappers before the name, name): ("model", "neck.x") of
    "_orig_mod.model.module.neck.x"."""
    parts = [part for part in name.split(".") if part not in _INNER]
    start = 0
    while start < len(parts) - 1 and _OUTER.fullmatch(parts[start]):
        start += 1
    return ".".join(parts[:start]), ".".join(parts[start:])


def _nested_dicts(content: Mapping[str, Any]) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """Returns the dicts in a checkpoint by their keys, each once, optimisers' left out."""
    result: dict[tuple[str, ...], Mapping[str, Any]] = {}
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Mapping[str, Any]]] = deque([((), content)])
    while waiting:
        path, node = waiting.popleft()
        if id(node) in seen or len(path) > _DEPTH:
            continue
        seen.add(id(node))
        result[path] = node
        for key, value in node.items():
            nested = isinstance(key, str) and isinstance(value, dict)
            if nested and why_left_out(key) not in (_OPTIMISER, _SCHEDULE):
                waiting.append(((*path, key), value))
    return result


def _groups(content: Mapping[str, Any], is_tensor: Callable[[Any], bool]) -> list[_Group]:
    """Returns a checkpoint's tensors, those of one label together."""
    groups: dict[tuple[int, str], _Group] = {}
    for path, node in _nested_dicts(content).items():
        for key, value in node.items():
            if not is_tensor(value):
                continue
            wrappers, name = split_wrappers(str(key))
            group = groups.setdefault((id(node), wrappers), _Group(path, wrappers))
            if name in group.tensors:
                raise WeightsError(
                    f"tensors {group.full_names[name][:80]!r} and {str(key)[:80]!r} are the same "
                    "one without their wrappers: remove one of them"
                )
            group.tensors[name], group.full_names[name] = value, str(key)
            group.num_known += tables.is_known(name)
    return list(groups.values())


def _choose(groups: Sequence[_Group], prefix: str) -> _Group:
    """Returns the network."""
    if prefix:
        ending = "." + prefix.strip(".")
        fitting = [group for group in groups if f".{group.label}".endswith(ending)]
        if len(fitting) != 1:
            labels = names.shorten(repr(group.label) for group in groups)
            raise WeightsError(f"--prefix={prefix}: fits {len(fitting)} of {labels}")
        return fitting[0]
    known = [group for group in groups if group.num_known]
    plain = [group for group in known if why_left_out(group.label) != _AVERAGE] or known
    bare = [group for group in plain if not group.wrappers]
    others = [group for group in plain if group.wrappers.split(".")[-1] != "teacher"]
    plain = bare if len(plain) > 1 and bare == others and len(bare) == 1 else plain
    if len(plain) > 1:
        listed = names.shorten(f"{g.label!r} ({g.num_known} tensors)" for g in plain)
        raise WeightsError(
            f"holds {len(plain)} networks: {listed}; choose one with convert.py --prefix=NAME"
        )
    if plain:
        return plain[0]
    # No table knows a name; an error will list those of the likeliest state dict.
    likely = [group for state in _STATES for group in groups if group.path[:1] == (state,)]
    return (likely or groups)[0]


def find_network(content: Any, is_tensor: Callable[[Any], bool], prefix: str = "") -> StateDict:
    """Returns the network's tensors of a checkpoint's object, names without wrappers.

    Args:
      content: dicts in dicts, as the file holds them.
      is_tensor: tells its tensors from everything else.
      prefix: label to take where there are several, or its last parts.

    Raises WeightsError when there are several networks.
    """
    if not isinstance(content, dict):
        raise WeightsError(f"holds a {type(content).__name__}, not a dict of tensors")
    groups = _groups(content, is_tensor)
    if not groups:
        return StateDict({}, tuple((str(key), "not a tensor") for key in content), content)
    group = _choose(groups, prefix)
    tensors = group.tensors
    if not group.num_known:
        tensors = _without_common_prefix(tensors)
    dropped = [
        (name, why_left_out(other.label) or why_left_out(name) or NO_RULE)
        for other in groups
        if other is not group and other.path == group.path
        for name in other.full_names.values()
    ]
    dropped += _left_out(content, group.path, is_tensor)
    here = group.path[:1]
    metadata = {k: v for k, v in content.items() if k not in here and not is_tensor(v)}
    return StateDict(tensors, tuple(dropped), metadata)


def _without_common_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors without a first part that all names share, where a table
    knows them then."""
    for count in range(1, 4):
        heads = Counter(".".join(name.split(".")[:count]) for name in tensors)
        if len(heads) > 1:
            break
        shorter = {name.split(".", count)[-1]: value for name, value in tensors.items()}
        if len(shorter) == len(tensors) and any(map(tables.is_known, shorter)):
            return shorter
    return tensors


def _left_out(
    content: Mapping[str, Any], path: tuple[str, ...], is_tensor: Callable[[Any], bool]
) -> list[tuple[str, str]]:
    """Returns what stands beside the state dict at `path`, and what in it is no tensor."""
    result: list[tuple[str, str]] = []
    node = content
    for depth in range(len(path) + 1):
        inside = depth == len(path)
        following = None if inside else path[depth]
        for key, value in node.items():
            if key == following or (inside and is_tensor(value)):
                continue
            plain = inside and not isinstance(value, dict)
            default = "not a tensor" if plain else "not part of the weights"
            result.append((str(key), why_left_out(str(key)) or default))
        node = node[following] if following is not None else node
    return result
