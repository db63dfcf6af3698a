"""What a user wrote and a config names, found by its import path and checked before a run.

An import path is "package.module:name". What is checked is what can be known without calling
it: that it is there, is of the kind that is wanted, and takes what it will be called with.
"""

import contextlib
import difflib
import importlib
import inspect
import pathlib
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from solov2_jax.io import InputError, reason

T = TypeVar("T")
# Where the code lies that no user wrote.
_NOT_OF_USERS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    str(pathlib.Path(__file__).parent),
    "<",
)


def import_object(path: str, key: str) -> Any:
    """Returns what an import path such as "mypackage.augment:cutout" names.

    Args:
      key: the config's key that holds the path, for messages.

    Raises:
      InputError: if the path has another form or leads nowhere.
    """
    name_of_module, _, name = path.partition(":")
    if not name_of_module.strip(".") or name_of_module[0] == "." or not name:
        raise InputError(f'{key}: {path!r} is no import path; write "package.module:name"')
    try:
        module = importlib.import_module(name_of_module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{key}: {path!r} cannot be imported ({reason(error)}); install the package or "
            "put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise InputError(f"{key}: {path!r} cannot be imported ({failure(error)})") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, dir(module), 1, 0.6)
        raise InputError(
            f"{key}: {path!r} cannot be imported: {module.__file__ or name_of_module} has no "
            f"{name}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return getattr(module, name)


def import_function(path: str, key: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """Returns the function that an import path names, which takes these arguments."""
    function = import_object(path, key)
    check_call(function, arguments, f"{key}: {path}")
    return function


def check_call(function: Any, arguments: Sequence[str], name: str) -> None:
    """Raises an InputError for what cannot be called with so many arguments, by position."""
    called = f"it is called with ({', '.join(arguments)})"
    if not callable(function):
        raise InputError(f"{name} is of type {type(function).__name__}, not a function; {called}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions in C nothing is known
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InputError(f"{name} has other parameters, {signature}: {called} ({error})") from error


def make_objects(paths: Iterable[str], key: str, base: type[T]) -> list[T]:
    """Returns an object of each class that a config key's import paths name.

    Raises:
      InputError: where a path leads nowhere, to no class derived from `base`, or to one that
        `check_methods` refuses.
    """
    objects = []
    for path in paths:
        kind, where = import_object(path, key), f"{key}: {path}"
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise InputError(f"{where} is not {_derived(base)}")
        check_call(kind, (), where)
        try:
            made = kind()
        except Exception as error:
            raise InputError(f"{where} cannot be made ({failure(error)})") from error
        check_methods(made, base, where)
        objects.append(made)
    return objects


def check_objects(objects: Any, argument: str, base: type) -> None:
    """Raises an InputError for what is no sequence of objects that `check_methods` lets pass."""
    if not isinstance(objects, Sequence):
        raise InputError(f"{argument} is a {type(objects).__name__}; give a list")
    for made in objects:
        name = getattr(made, "__name__", type(made).__name__)
        if isinstance(made, type) and issubclass(made, base):
            raise InputError(f"{argument} has the class {name}; give an object of it, {name}()")
        if not isinstance(made, base):
            raise InputError(f"{argument} has {name}, which is no object of {_derived(base)}")
        check_methods(made, base, f"{argument}: {name}")


def check_methods(made: object, base: type, where: str) -> None:
    """Raises an InputError for an object whose methods would never be called, or fail when
    they are.

    A method with nearly the name of one of the base's is taken for misspelt.
    """
    public = [name for name in dir(base) if name[0] != "_" and callable(getattr(base, name))]
    own = [name for name in public if getattr(made, name) != _bound(base, name, made)]
    for name in sorted(set(dir(made)) - set(dir(base))):
        near = difflib.get_close_matches(name, set(public) - set(own), 1, 0.8)
        if near and name[0] != "_" and callable(getattr(made, name)):
            raise InputError(f"{where}: nothing calls its {name}; did you mean {near[0]}?")
    if not own:
        raise InputError(f"{where} has none of the methods {', '.join(public)}")
    for name in own:
        arguments = list(inspect.signature(getattr(base, name)).parameters)[1:]
        check_call(getattr(made, name), arguments, f"{where}: {name}")


def _bound(base: type, name: str, made: object) -> Any:
    """Returns the base's method as the object has it if nobody overrides it."""
    return getattr(base, name).__get__(made)


def _derived(base: type) -> str:
    module = ".".join(base.__module__.split(".")[:2])
    return f"a class derived from {module}.{base.__name__}"


@contextlib.contextmanager
def named_failure(where: str) -> Iterator[None]:
    """Turns what the user's code raises within `with` into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where} failed ({failure(error)})") from error


def failure(error: BaseException) -> str:
    """Returns an error's class and message on one line, and the user's line that it is from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OF_USERS)]
    where = f", {pathlib.Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    return reason(error) + where
