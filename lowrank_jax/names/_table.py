"""Table: rules that map a path in a parameter tree to a torch module and its parameter."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError

# the last key of a leaf -> the name of the torch parameter
KINDS = {
    **dict.fromkeys(("kernel", "embedding", "scale", "weight", "w"), "weight"),
    **dict.fromkeys(("bias", "b"), "bias"),
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a torch module.

    Args:
      module: the module's name, with "{}" for the layer number if one leaf stacks all layers.
      kind: the parameter's name within the module, such as "weight" or "bias".
      fan_in_fan_out: the torch weight is [in, out], as in GPT-2's Conv1D, instead of [out, in].
      tied: the module that shares the weight, if the model does not store one for it.

    >>> Parameter("model.layers.{}.mlp.up_proj").key
    'model.layers.{}.mlp.up_proj.weight'
    """

    module: str
    kind: str = "weight"
    fan_in_fan_out: bool = False
    tied: str | None = None

    @property
    def key(self) -> str:
        """The parameter's name in a state dict."""
        return f"{self.module}.{self.kind}"


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rules that name a model's leaves; calling the table with a path returns a Parameter or None.

    The left side of a rule is a module's path in the tree: "/" separates keys, "|" separates
    alternatives for a key, "#" is a layer: `layers_0`, `layers/0`, `layers.0`, or `layers` alone if
    all layers are stacked. The right side is the module's name, with "{}" for the layer number. The
    last key of a leaf selects the module's parameter: kernel, embedding and scale are the weight.
    The first rule that matches wins.

    Args:
      modules: rules for modules.
      parameters: rules for single leaves, with other last keys: whole path -> whole name.
      layers: alternatives for the key of the layers.
      prefixes: alternatives for keys that may precede the path of a rule, any number of them.
      fan_in_fan_out: last parts of the names of modules whose torch weight is [in, out].
      tied: embedding -> the projection that shares its weight in models with weight tying.

    >>> table = Table({"#/attn|attention/query|q_proj": "model.layers.{}.self_attn.q_proj"})
    >>> table("params/layers_3/attn/query/kernel").key
    'model.layers.3.self_attn.q_proj.weight'
    >>> table("params/layers/attn/query/bias").key
    'model.layers.{}.self_attn.q_proj.bias'
    """

    modules: Mapping[str, str]
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: str = "layers|layer|blocks|block|h"
    prefixes: str = "params|batch_stats|model|language_model|transformer|encoder|decoder"
    fan_in_fan_out: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, path: str) -> Parameter | None:
        """Return the Parameter of the leaf at path, or None if no rule matches."""
        if (key := _apply_rules(self._rules[1], path)) is not None:
            module, _, kind = key.rpartition(".")
            return self._make_parameter(module, kind)
        head, _, last = path.rpartition("/")
        module = _apply_rules(self._rules[0], head) if last in KINDS else None
        return None if module is None else self._make_parameter(module, KINDS[last])

    def _make_parameter(self, module: str, kind: str) -> Parameter:
        if kind != "weight":
            return Parameter(module, kind)
        last = module.rpartition(".")[2]
        return Parameter(module, kind, last in self.fan_in_fan_out, self.tied.get(module))

    @functools.cached_property
    def _rules(self) -> tuple[list[tuple[re.Pattern, str]], list[tuple[re.Pattern, str]]]:
        """The compiled rules for modules and for single parameters."""
        compiled = lambda rules: [(self._compile(left), right) for left, right in rules.items()]
        return compiled(self.modules), compiled(self.parameters)

    def _compile(self, rule: str) -> re.Pattern:
        # "#/attn|attention/q" becomes, with the default layers and prefixes shortened,
        # (?:(?:params|model)/)*(?:layers|h)(?:[_./](\d+))?/(?:attn|attention)/(?:q)
        # whose group 1 is the layer number; it is None where all layers are stacked.
        layer = rf"(?:{self.layers})(?:[_./](\d+))?"
        keys = [
            layer if key == "#" else f"(?:{'|'.join(map(re.escape, key.split('|')))})"
            for key in rule.split("/")
        ]
        return re.compile(rf"(?:(?:{self.prefixes})/)*" + "/".join(keys))


def _apply_rules(rules: list[tuple[re.Pattern, str]], path: str) -> str | None:
    """Return the right side of the first rule that matches, with the layer number filled in."""
    for pattern, right in rules:
        if found := pattern.fullmatch(path):
            number = found.group(1) if pattern.groups else None
            return right if number is None else right.replace("{}", number)
    return None


Names = Mapping[str, str | Parameter] | Callable[[str], str | Parameter | None] | None


@check_arguments(CheckpointError)
def parameter(path: str, names: Names = None) -> Parameter | None:
    """Return the torch parameter that corresponds to the leaf at a path.

    Args:
      path: the leaf's keys joined by "/".
      names: a table of this package; or a mapping from paths, or a function of a path, to a
        module's name (with "{}" for the layer number of a leaf that stacks all layers), a
        Parameter, or None. By default, the path without its last key, with "/" replaced by ".".

    Returns:
      The Parameter, or None if names has none for the path. If names gives only a module's name,
      the last key of the path selects the parameter.

    Raises:
      CheckpointError: names returned another type.

    >>> from lowrank_jax.names import GPT2, LLAMA
    >>> parameter("params/head/kernel").key
    'params.head.weight'
    >>> parameter("model/layers/0/self_attn/q_proj/kernel", LLAMA).key
    'model.layers.0.self_attn.q_proj.weight'
    >>> parameter("h_1/attn/c_attn/kernel", GPT2)
    Parameter(module='transformer.h.1.attn.c_attn', kind='weight', fan_in_fan_out=True, tied=None)
    """
    head, _, last = path.rpartition("/")
    if names is None:
        named = head.replace("/", ".") or None
    else:
        named = names.get(path) if isinstance(names, Mapping) else names(path)
    if named is None or isinstance(named, Parameter):
        return named
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            f"names gives {named!r} for {path!r}: expected a module's name, a Parameter, or None"
        )
    return Parameter(named, KINDS.get(last, last))
