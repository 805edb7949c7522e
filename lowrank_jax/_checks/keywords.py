"""Errors for the arguments of a configuration: by position, or by the names of another library."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lowrank_jax._checks.arguments import describe_value
from lowrank_jax._errors import ConfigError

C = TypeVar("C", bound=type)

# keyword of PEFT's LoraConfig -> what it is here
PEFT_KEYWORDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": 'targets, patterns of whole paths: "**/q_proj/kernel"',
    "exclude_modules": "exclude, patterns of whole paths",
    "target_parameters": "targets, patterns of whole paths",
    "modules_to_save": 'train, patterns of whole paths: "head/*"',
    "trainable_token_indices": "train_rows, pattern of a table -> rows",
    "lora_dropout": "an argument of combine: lowrank.combine(base, lora, dropout=rate, key=key)",
    "init_lora_weights": 'an argument of init: lowrank.init(..., initializer="pissa")',
    "use_rslora": "rslora",
    "use_dora": "dora",
    "bias": 'train, patterns of whole paths: "**/bias"',
    "fan_in_fan_out": "found by lowrank.plan",
    "layers_to_transform": "part of targets: a pattern may name the layer",
    "base_model_name_or_path": 'a key of extras: extras={"base_model_name_or_path": name}',
    "task_type": 'a key of extras: extras={"task_type": "CAUSAL_LM"}',
    "peft_type": "of an adapter_config.json, which lowrank.peft.load reads",
}

# keyword of BitsAndBytesConfig of transformers -> what it is here
BITSANDBYTES_KEYWORDS = {
    "load_in_4bit": 'format="nf4"',
    "load_in_8bit": 'format="int8"',
    "bnb_4bit_quant_type": "format",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "the dtype of the inputs of each product",
    "bnb_4bit_quant_storage": "packing",
}


def explain_keywords(library: str, known: Mapping[str, str]) -> Callable[[C], C]:
    """Make a decorator of a dataclass, whose constructor explains wrong arguments.

    These are arguments by position, and the keywords of another library.

    Args:
      library: its name, for the error.
      known: keyword of the library -> what it is here.

    >>> @explain_keywords("PEFT", {"r": "rank"})
    ... @dataclasses.dataclass
    ... class Config:
    ...     rank: int = 16
    >>> Config(r=8)
    Traceback (most recent call last):
    lowrank_jax._errors.ConfigError: Config has other names than PEFT: r is rank
    >>> Config(8)
    Traceback (most recent call last):
    lowrank_jax._errors.ConfigError: Config takes its fields by keyword, as in Config(rank=...): the
    first argument is an int, 8, without a name
    """

    def decorate(cls: C) -> C:
        init = cls.__init__
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(cls)  # type: ignore[arg-type]

        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                names = ", ".join(f"{field.name}=..." for field in fields[: len(args)])
                call = f"{cls.__name__}({names})"
                if isinstance(args[0], Mapping):
                    call = f"{cls.__name__}.from_dict(values)"
                raise ConfigError(
                    f"{cls.__name__} takes its fields by keyword, as in {call}: the first argument "
                    f"is {describe_value(args[0])}, without a name"
                )
            if not known.keys().isdisjoint(kwargs):
                text = describe_keywords(known, kwargs)
                raise ConfigError(f"{cls.__name__} has other names than {library}: {text}")
            init(self, *args, **kwargs)

        cls.__init__ = wrapper
        return cls

    return decorate


def describe_keywords(known: Mapping[str, str], keywords: Iterable[str]) -> str:
    """Say what each known keyword is here."""
    return "; ".join(f"{name} is {known[name]}" for name in keywords if name in known)


def check_keys(cls: type, values: object, known: Mapping[str, str]) -> None:
    """Raise ConfigError if the argument of from_dict is not a mapping of fields of the class.

    Args:
      cls: a dataclass.
      values: the argument.
      known: keyword of another library -> what it is here.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{cls.__name__}.from_dict takes a mapping, as to_dict returns it, not "
            f"{describe_value(values)}"
        )
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names, key=str):
        hint = describe_keywords(known, unknown)
        raise ConfigError(
            f"unknown {cls.__name__} keys {unknown}; "
            + (f"{hint}; " if hint else "")
            + f"known are {sorted(names)}"
        )
