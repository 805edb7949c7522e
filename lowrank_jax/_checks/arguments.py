"""Validation of the arguments of public functions against their annotations."""

from __future__ import annotations

import collections.abc
import dataclasses
import errno
import functools
import inspect
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError, LowrankError, TreeError

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Validator:
    """A check of one argument; `a | b` accepts a value that either accepts.

    Args:
      holds: a predicate on values, which raises nothing.
      expected: what is accepted, for the error.

    >>> (number | nothing).expected, (number | nothing).holds("1")
    ('a finite number or None', False)
    """

    holds: Callable[[Any], bool]
    expected: str

    def __or__(self, other: Validator) -> Validator:
        expected = " or ".join(filter(None, (self.expected, other.expected)))
        return Validator(lambda value: self.holds(value) or other.holds(value), expected)


def check_arguments(
    error: type[LowrankError] = ConfigError, /, **overrides: Validator
) -> Callable[[F], F]:
    """Make a decorator that checks the arguments of each call against their annotations.

    Args:
      error: the class of the errors.
      **overrides: argument -> Validator, instead of its annotation.

    Returns:
      A decorator. The function that it returns raises `error` for the first invalid argument, and
      says what was passed and what was expected.
    """

    def decorate(function: F) -> F:
        parameters = [*inspect.signature(function).parameters.values()]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        keyword = (inspect.Parameter.KEYWORD_ONLY, *variable)
        order = [parameter.name for parameter in parameters if parameter.kind not in keyword]
        shown_order = ", ".join(name for name in order if name != "cls")
        optional = {parameter.name for parameter in parameters if parameter.default is None}

        # Annotations are strings that may name classes defined later in their module, so they are
        # resolved at the first call rather than here.
        @functools.cache
        def resolve_validators() -> Mapping[str, Validator]:
            """Map each annotated argument to its validator."""
            named = [parameter for parameter in parameters if parameter.kind not in variable]
            given = {p.name: p.annotation for p in named if p.annotation is not p.empty}
            names = given.keys() - overrides.keys()
            hints = {name: _resolve_annotation(given[name], function) for name in names}
            return {name: to_validator(hint) for name, hint in hints.items()} | overrides

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            validators = resolve_validators()
            for name, value in (*zip(order, args, strict=False), *kwargs.items()):
                validator = validators.get(name)
                if validator is None or validator.holds(value):
                    continue
                if value is None and name in optional:
                    continue
                where = f" takes ({shown_order})" if name in order else ""
                raise error(
                    f"{function.__name__}{where}: {name} is {describe_value(value)}; expected "
                    f"{validator.expected}"
                )
            return function(*args, **kwargs)

        return typing.cast(F, wrapper)

    return decorate


def _resolve_annotation(annotation: Any, function: Callable) -> Any:
    """Return the type of an annotation, which may be a string."""
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, inspect.unwrap(function).__globals__)


def describe_value(value: Any) -> str:
    """Describe a value by its type, and its shape and dtype or its text if that is short."""
    if value is None or isinstance(value, bool):
        return repr(value)
    name = type(value).__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{article} {name} of shape {value.shape} and dtype {value.dtype}"
    plain = isinstance(value, int | float | complex | str | bytes | os.PathLike)
    text = (
        ascii(quote_value(value))[1:-1] if isinstance(value, int) else ascii(value) if plain else ""
    )
    return f"{article} {name}" + (f", {text}" if 0 < len(text) <= 60 else "")


def to_validator(annotation: Any) -> Validator:
    """Return the validator for an annotation."""
    if annotation is None or annotation is types.NoneType:
        return nothing
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in inner if part is not str or os.PathLike not in inner]
        return functools.reduce(Validator.__or__, map(to_validator, parts))
    if annotation is os.PathLike:
        return path
    if annotation in _KINDS:
        return _KINDS[annotation]
    if origin is tuple or annotation is tuple:
        return integers
    if origin is collections.abc.Sequence:
        return texts
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return function
    return instance_of(origin or annotation)


def instance_of(cls: type) -> Validator:
    """Return a validator that accepts the instances of a class."""
    name = "mapping" if cls is collections.abc.Mapping else cls.__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return Validator(lambda value: isinstance(value, cls), f"{article} {name}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a Python or NumPy integer, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_index(value: object) -> bool:
    """Whether a value is an integer that fits in int32, as an index does."""
    return is_integer(value) and abs(value) < 2**31


def is_finite(value: Any) -> bool:
    """Whether a value is a number, not a bool, that is finite in float32."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, np.generic):  # includes scalars of bfloat16
        numeric = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
    if not numeric:
        return False
    try:
        return math.isfinite(value) and abs(float(value)) <= float(np.finfo(np.float32).max)
    except OverflowError:
        return False


def is_number_like(value: object) -> bool:
    """Whether a value is a finite number or an array, perhaps traced, of real numbers."""
    if isinstance(value, jax.Array) or type(value) is np.ndarray:
        dtype = value.dtype
        return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return is_finite(value)


def is_key(value: object) -> bool:
    """Whether a value is one PRNG key, typed or a raw uint32 array."""
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    return value.dtype == np.uint32 and value.shape in ((2,), (4,))


def _is_index_like(value: Any) -> bool:
    """Whether a value is an integer or a concrete array of one integer."""
    try:
        operator.index(value)
    except Exception:  # JAX raises its own error for a tracer
        return False
    return not isinstance(value, bool) and getattr(value, "dtype", None) != np.bool_


def is_seed(value: object) -> bool:
    """Whether a value is an integer that fits in the seed of `jax.random.key`."""
    return is_integer(value) and 0 <= value < 2**32


def _is_path(value: object) -> bool:
    """Whether a value is a path that the file system accepts, whether or not it exists."""
    if not isinstance(value, str | os.PathLike):
        return False
    # The file system itself is asked whether it accepts the path. A missing file is fine, but a
    # name that is too long or not encodable, or a loop of symbolic links, would fail only later.
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        return False
    try:
        os.stat(text)
    except UnicodeEncodeError:
        return False
    except OSError as error:
        return error.errno not in (errno.ENAMETOOLONG, errno.ELOOP)
    return True


def _is_transformation(value: object) -> bool:
    """Whether a value has the methods of an Optax transformation."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def _is_matrix(value: object) -> bool:
    """Whether a value is a nonempty float32 or float64 matrix."""
    if not isinstance(value, jax.Array | np.ndarray) or value.ndim != 2 or not value.size:
        return False
    return value.dtype in (np.float32, np.float64)


def _is_shape_of_matrix(value: object) -> bool:
    """Whether a value is, or describes, a nonempty matrix of a floating dtype."""
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return False
    return len(value.shape) == 2 and value.size > 0 and jnp.issubdtype(value.dtype, jnp.floating)


def is_scalar(value: object) -> bool:
    """Whether a value is a number that JAX can convert, or an array of shape []."""
    if isinstance(value, jax.Array) or type(value) is np.ndarray:
        return value.shape == () and is_number_like(value)
    return is_finite(value) and (not is_integer(value) or is_index(value))


def _is_factor_scale(value: Any) -> bool:
    """Whether a value is a scalar above 0, or an array of one, whose sign is not checked."""
    return is_scalar(value) and (hasattr(value, "shape") or value > 0)


def _is_axis_rules(value: object) -> bool:
    """Whether a value maps names to a name, several, or None; or is None."""
    if value is None:
        return True
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, collections.abc.ItemsView | tuple | list):
        return False
    is_axes = lambda axes: (
        axes is None
        or all(
            isinstance(axis, str) for axis in (axes if isinstance(axes, tuple | list) else (axes,))
        )
    )
    return all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and is_axes(pair[1])
        for pair in pairs
    )


def _is_tree_of_arrays(value: object) -> bool:
    """Whether a value is a container or an array."""
    if value is None or not jax.tree_util.all_leaves([value]):
        return value is not None
    return hasattr(value, "shape") and hasattr(value, "dtype") and not has_unsupported_dtype(value)


def _is_floating_dtype(value: object) -> bool:
    """Whether a value is a floating dtype or the name of one."""
    if not isinstance(value, str | type | np.dtype):
        return hasattr(value, "dtype") and callable(value) and _is_floating_dtype(value.dtype)
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, UnicodeEncodeError):
        return False


def has_unsupported_dtype(value: object) -> bool:
    """Whether a value is a NumPy array of a dtype that JAX does not support."""
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "OSUMm"


def refuse_unsupported_dtypes(values: Sequence[Any], paths: Sequence[str]) -> None:
    """Raise TreeError for an argument of a dtype that JAX does not support."""
    for value, where in zip(values, paths, strict=True):
        if has_unsupported_dtype(value):
            raise TreeError(
                f"{where!r} is a NumPy array of {value.dtype}, a dtype that JAX does not "
                "support: take it out of the tree"
            )


anything = Validator(lambda value: True, "anything")
path = Validator(_is_path, "a path that the file system takes, as non-empty text or a pathlib.Path")
function = Validator(callable, "a function")
number = Validator(is_finite, "a finite number")
number_like = Validator(is_number_like, "a finite number or an array of real numbers")
key = Validator(is_key, "a PRNG key (jax.random.key(0))")
key_or_seed = key | Validator(is_seed, "an integer seed in [0, 2**32)")
transformation = Validator(
    _is_transformation, "an Optax transformation, as optax.adamw(1e-3) returns it"
)
texts_mapping = Validator(
    lambda value: (
        isinstance(value, collections.abc.Mapping) and all(isinstance(key, str) for key in value)
    ),
    "a mapping whose keys are texts",
)
factor_scale = Validator(_is_factor_scale, "a finite number above 0")
rate = Validator(is_scalar, "a finite number") | Validator(callable, "a schedule")
nothing = Validator(lambda value: value is None, "None")
integer_like = Validator(_is_index_like, "an integer")
shape_of_matrix = Validator(
    _is_shape_of_matrix, "a floating matrix [fan-in, fan-out], or its shape"
)
matrix = Validator(_is_matrix, "a float32 or float64 matrix [fan-in, fan-out]")
rank = Validator(
    lambda value: is_index(value) and value > 0, "an integer of at least 1 and below 2**31"
)
count = Validator(lambda value: is_index(value) and value >= 0, "an integer in [0, 2**31)")
positive = Validator(
    lambda value: is_finite(value) and value >= np.finfo(np.float32).tiny, "a finite number above 0"
)
tree_of_arrays = Validator(_is_tree_of_arrays, "a tree of arrays")
name_text = Validator(lambda value: isinstance(value, str) and bool(value), "non-empty text")
floating_dtype = Validator(_is_floating_dtype, "a floating dtype")
integers = Validator(
    lambda value: isinstance(value, tuple | list) and all(map(is_integer, value)),
    "a tuple of integers",
)
axis_rules = Validator(
    _is_axis_rules, "a mapping of logical axis to mesh axis, or pairs of them, or None"
)
texts = Validator(
    lambda value: isinstance(value, tuple | list) and all(isinstance(i, str) for i in value),
    "a sequence of texts",
)

_KINDS: dict[Any, Validator] = {
    Any: anything,
    bool: Validator(lambda value: isinstance(value, bool), "True or False"),
    int: Validator(is_integer, "an integer"),
    float: number,
    str: Validator(lambda value: isinstance(value, str), "text"),
}
