"""A configuration from a file, from flags and from JSON: loaded, checked, compared.

The keys and their meaning stand in `configs/base.py`; this module knows only their
form, and that no value is silently ignored.
"""

import ast
import difflib
import functools
import inspect
import logging
import os
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from solov2_jax import config_schema
from solov2_jax.config_files import (
    bind_configs,
    find_config,
    run_config,
    shipped_configs,
    split_variant,
)
from solov2_jax.config_schema import FREE, keep_numbers, lock, old_names, set_below, wrong_values
from solov2_jax.io import InputError, read_json, reading, reason, write_json

# A ConfigDict; its attributes are not known to type checkers.
Config = Any

log = logging.getLogger("solov2_jax")


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked, locked config of a file, with overrides applied.

    Args:
      path: a Python file with `get_config()`, a `config.json` of a workdir, or the
        name of a shipped config, such as "r50_3x"; "FILE:NAME" calls `get_config(NAME)`.
      overrides: flags of the form "--config.train.steps=100", later ones win.
    """
    path, variant = split_variant(path)
    file = find_config(path)
    if file.suffix == ".json" and variant:
        raise InputError(f"config file {path}: a JSON file has no variant {variant!r}")
    config: Config = read_config(file) if file.suffix == ".json" else _call_file(file, variant)
    lock(config)
    overrides, before = renamed_overrides(overrides), flatten(config)
    apply_overrides(config, overrides)
    check_config(config)
    stored = file.suffix == ".json" and config.augment.preset == before["augment.preset"]
    if config.augment.preset and not stored:
        shipped = file.resolve().parent == shipped_configs().resolve()
        apply_preset(config, {} if shipped else before, overrides)
        check_config(config)
    keep_numbers(config, _base().rules())
    check_effect(config, overrides)
    return config


def _call_file(file: pathlib.Path, variant: str = "") -> ConfigDict:
    bind_configs(file.resolve().parent)
    old = (*_base().RENAMED, *_base().REMOVED)
    token = old_names.set(old)
    try:
        with reading(file, "a config file", "It is Python with a function get_config()"):
            make = run_config(file).get_config
            if variant and not inspect.signature(make).parameters:
                raise InputError(f"its get_config() takes no variant, {variant!r} is given")
            config = make(variant) if variant else make()
    finally:
        old_names.reset(token)
    if not isinstance(config, ConfigDict):
        raise InputError(f"config file {file}: get_config() returned no ConfigDict")
    for key in old:
        _rename(config, key, _base().RENAMED.get(key), str(file))
    return config


@functools.cache
def _base() -> types.ModuleType:
    """Returns the shipped `configs/base.py`, whichever `configs` a file has bound."""
    return run_config(shipped_configs() / "base.py")


def _rename(config: ConfigDict, old: str, new: str | None, place: str) -> None:
    """Moves what a file gave an old key to the new one; None: there is none."""
    value = _group(config, old).get(old.split(".")[-1])
    with config.unlocked():
        _delete(config, old)
    if value is None:
        return
    if new is None:
        log.info("%s: %s is gone: %s", place, old, _base().REMOVED[old])
        return
    log.info("%s: %s is now called %s; it is read as that", place, old, new)
    _group(config, new)[new.split(".")[-1]] = value


def _group(config: ConfigDict, key: str) -> ConfigDict:
    """Returns the group that a key is in."""
    group: Any = config
    for name in key.split(".")[:-1]:
        group = group[name]
    return group


def _delete(config: ConfigDict, key: str) -> None:
    """Deletes a key, and its group if that is empty then."""
    group, _, name = key.rpartition(".")
    del _group(config, key)[name]
    if group and not _group(config, key):
        _delete(config, group)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (other arguments, "--config.key=value" arguments).

    "--config.key value" is accepted too and joined.
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.lstrip("-").startswith("config."):
            rest.append(argument)
        elif "=" in argument:
            overrides.append("--" + argument.lstrip("-"))
        else:
            value = next(arguments, None)
            if value is None:
                raise ValueError(f"{argument}: no value; write {argument}=VALUE")
            overrides.append(f"--{argument.lstrip('-')}={value}")
    return rest, overrides


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Returns the keys of "--config.key=value" arguments."""
    return {o.removeprefix("--config.").partition("=")[0] for o in overrides}


def renamed_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with today's names of keys, which log lines tell.

    Those of keys that are gone are left out.
    """
    renamed, names, removed = [], _base().RENAMED, _base().REMOVED
    for override in overrides:
        key, equals, value = override.removeprefix("--config.").partition("=")
        if key in removed:
            log.info("--config.%s: the key is gone: %s", key, removed[key])
            continue
        if key in names:
            log.info("--config.%s: the key is now called %s", key, names[key])
        renamed.append(f"--config.{names.get(key, key)}{equals}{value}")
    return renamed


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets the keys named by "--config.key=value" strings in a config, in place.

    Keys below `config.user` and `config.data.providers` need not exist.
    """
    known, argv = flatten(config), ["config"]
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        if _is_new(key, known):
            set_below(config, key, _literal(value))
            continue
        if key not in known:
            inside = any(name.startswith(key + ".") for name in known)
            why = "is a group of keys, not a key" if inside else "unknown key"
            raise ValueError(f"--config.{key}: {why}{suggest(key, known)}")
        argv.append(override)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        message = " ".join(str(error).split()).removeprefix("flag ")
        raise ValueError(f"{message} (default: see configs/base.py)") from error


def _is_new(key: str, known: Mapping[str, Any]) -> bool:
    return key.startswith(tuple(f"{group}." for group in FREE)) and key not in known


def _literal(text: str) -> Any:
    """Returns the Python literal that a text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def suggest(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean ...?" with the nearest name, by its last part too; "." if
    none is near."""
    names = list(names)
    last = name.split(".")[-1]
    near = [n for n in names if n.split(".")[-1] == last]
    near = near or difflib.get_close_matches(name, names, 1, 0.6)
    if not near:
        tails = {n.split(".")[-1]: n for n in names}
        near = [tails[t] for t in difflib.get_close_matches(last, tails, 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else "."


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns {"train.steps": 270000, ...}."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))  # type: ignore[arg-type]
        else:
            flat[prefix + key] = value
    return flat


def apply_preset(config: Config, before: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Sets, in place, what `augment.preset` names, but for keys that the user gave.

    Args:
      before: the values of the user's own config file, {} of a shipped one.
      overrides: of the command line.
    """
    base, name = _base(), config.augment.preset
    default = flatten(base_config())
    earlier = base.PRESETS.get(before.get("augment.preset", ""), {})
    given = {o.removeprefix("--config.").partition("=")[0] for o in overrides}
    values, kept = {}, []
    is_rgb = config.data.channels == 3 and not config.data.value_range
    for key, value in base.PRESETS[name].items():
        full = f"augment.{key}"
        own = before.get(full, default[full])
        if full in given or own not in (default[full], earlier.get(key, own)):
            kept.append(f"{full} (given)")
        elif key in config_schema.RGB_ONLY and not is_rgb:
            kept.append(f"{full} (for 8-bit RGB)")
        elif key == "scale" and config.augment.jitter_scale:
            kept.append(f"{full} (augment.jitter_scale is)")
        else:
            values[full] = config.augment[key] = value
    pairs = ", ".join(f"{key} = {value}" for key, value in values.items())
    left = f"; not set: {', '.join(kept)}" if kept else ""
    log.info("augment.preset = %s sets %s%s", name, pairs, left)


def input_statistics(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns `input.mean` and `input.std` of each channel.

    One entry is that of all channels. The three of RGB weights with another number of
    channels follow the stem's weights (`weights.convert.adapt_stem`): the average for one
    channel, else red, green, blue in turn.
    """
    number, bgr = config.data.channels, config.input.channel_order == "BGR"

    def of_each(values: Sequence[float]) -> tuple[float, ...]:
        if len(values) == number:
            return tuple(values)
        rgb = tuple(values[::-1]) if bgr else tuple(values)
        if number == 1:
            return (sum(rgb) / len(rgb),)
        return tuple(rgb[i % len(rgb)] for i in range(number))

    return of_each(config.input.mean), of_each(config.input.std)


def check_config(config: ConfigDict) -> None:
    """Raises one InputError that names every key with an impossible value."""
    base = _base()
    if wrong := list(wrong_values(flatten(config), base.rules(), base.RELATIONS)):
        raise InputError("config: " + "; ".join(wrong))


def is_used(config: Config, key: str) -> bool:
    """Returns whether a key has an effect beside the others."""
    flat = flatten(config)
    return not any(c.reason(flat) for c in _base().rules()[key].conditions)


def check_effect(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Raises an InputError for keys that were given and that the others make inert.

    Args:
      overrides: what was given; a config file may hold values that are not used.
    """
    flat, rules = flatten(config), _base().rules()
    inert = []
    for override in overrides:
        key = override.removeprefix("--config.").partition("=")[0]
        reasons = [c.reason(flat) for c in rules[key].conditions] if key in rules else []
        if why := next(filter(None, reasons), ""):
            inert.append(f"{override} has no effect: {why}")
    if inert:
        raise InputError("; ".join(inert))


def save_config(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes a config as JSON, whole or not at all."""
    write_json(config.to_dict(), path)


def base_config() -> Config:
    """Returns the configuration of `configs/base.py`, which has every key."""
    return _base().get_config()


def read_config(path: str | os.PathLike) -> Config:
    """Returns the locked config of a JSON file; lists come back as tuples.

    Keys that are newer than the file get the value that `configs/base.py` gives them,
    which a log line tells; a key that is not there is an error.
    """
    values = read_json(path, "a config.json")
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a config: the file holds no JSON object")
    with reading(path, "a config.json"):
        return _filled(_tuples(values), path)


def _filled(values: dict[str, Any], path: str | os.PathLike) -> Config:
    """Returns the base config with all of `values` set."""
    config, flat = base_config(), flatten(values)
    known, names = flatten(config), _base().RENAMED
    for old in [key for key in names if key in flat]:
        log.info("%s: %s is now called %s; it is read as that", path, old, names[old])
        flat.setdefault(names[old], flat.pop(old))
    for old in [key for key in _base().REMOVED if key in flat]:
        log.info("%s: %s is gone: %s", path, old, _base().REMOVED[old])
        del flat[old]
    unknown = [key for key in flat if key not in known and not _is_new(key, known)]
    if unknown:
        raise InputError(
            f"{path}: unknown keys: {', '.join(unknown)}"
            f"{suggest(unknown[0], known)} Was it written by a newer version, or by "
            "hand? Delete what configs/base.py does not have"
        )
    for key, value in flat.items():
        if key in known:
            try:
                _group(config, key)[key.split(".")[-1]] = value
            except TypeError as error:
                raise InputError(f"{path}: {key} = {value!r}: {reason(error)}") from error
        else:
            set_below(config, key, value)
    for key, value in _base().ABSENT.items():
        if key not in flat:
            known[key] = _group(config, key)[key.split(".")[-1]] = value
    if missing := [f"{k} = {v!r}" for k, v in known.items() if k not in flat]:
        log.info(
            "%s is older than these keys, which get these values: %s",
            path,
            ", ".join(missing),
        )
    return config


def values_before_keys(path: str | os.PathLike) -> dict[str, Any]:
    """Returns, of the keys that a config.json is older than, those whose value then was another
    than `configs/base.py`'s is now."""
    written = flatten(read_json(path, "a config.json"))
    return {key: value for key, value in _base().ABSENT.items() if key not in written}


def changed_keys(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} of what differs; "(absent)" if missing."""
    a, b = flatten(old), flatten(new)
    keys = [*b, *(key for key in a if key not in b)]
    pairs = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in keys}
    return {k: (x, y) for k, (x, y) in pairs.items() if _tuples(x) != _tuples(y)}


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return value
