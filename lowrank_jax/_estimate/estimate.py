"""estimate: the memory of a step, from shapes alone, as the compiler assigns it."""

from __future__ import annotations

import dataclasses
import html
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lowrank_jax._checks.arguments import (
    check_arguments,
    count,
    function,
    integers,
)
from lowrank_jax._display.table import Table, format_bytes
from lowrank_jax._errors import ConfigError
from lowrank_jax._estimate.advice import list_advice
from lowrank_jax._estimate.chips import find_chip
from lowrank_jax._estimate.compilation import compile_step
from lowrank_jax._estimate.groups import GROUPS, group_arguments


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one call of a step, in bytes on each device.

    Args:
      arguments: of the arguments, while the step runs, and of arrays that it closes over. What is
        in the memory of an accelerator's host is not counted.
      temporaries: of activations and all else that lives only in the step.
      outputs: of the results, without those that reuse the memory of donated arguments.
      groups: the arguments by what they are: "base", "scales", "adapters", "optimizer", "other",
        "closed over", and "padding", which the compiler adds; their sum is `arguments`.
      target: name of the chip, or of the present backend.
      devices: number of devices.
      capacity: memory of the chip in bytes, or None.
      advice: what would take less memory, with the bytes where they follow from shapes.
      collectives: what moves between devices: kind and dtype, such as "all-gather u8", -> bytes
        that one step brings to each device, by XLA's program.

    >>> groups = {"base": 1024, "adapters": 64}
    >>> found = Estimate(1088, 512, 64, groups, "cpu", 1)
    >>> found.total, found.fits
    (1664, None)
    """

    arguments: int
    temporaries: int
    outputs: int
    groups: Mapping[str, int]
    target: str
    devices: int
    capacity: int | None = None
    advice: tuple[str, ...] = ()
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """The most that the step holds: arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool | None:
        """Whether the total is at most the chip's memory; None without a chip."""
        return None if self.capacity is None else self.total <= self.capacity

    def _table(self) -> Table:
        rows = [(f"  {name}", format_bytes(size)) for name, size in self.groups.items() if size]
        rows = [
            ("arguments", format_bytes(self.arguments)),
            *rows,
            ("temporaries", format_bytes(self.temporaries)),
            ("outputs", format_bytes(self.outputs)),
            ("total", format_bytes(self.total)),
            *((name, format_bytes(size)) for name, size in self.collectives.items()),
        ]
        many = f", on each of {self.devices} devices" if self.devices > 1 else ""
        return Table((f"{self.target}{many}", "memory"), tuple(rows), frozenset({"memory"}))

    def _notes(self) -> list[str]:
        if self.capacity is None:
            return list(self.advice)
        word = "fits" if self.fits else "does not fit"
        return [f"{word} in {format_bytes(self.capacity)}", *self.advice]

    def __str__(self) -> str:
        return "\n".join([str(self._table()), *(f"- {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        """HTML for a notebook: a bar of the parts, the table and the advice."""
        items = "".join(f"<li>{html.escape(note)}</li>" for note in self._notes())
        return f"<div>{self._bar()}{self._table().html()}<ul>{items}</ul></div>"

    def _bar(self) -> str:
        """A bar as long as the chip's memory, or the total, one color for each part."""
        parts = {**self.groups, "temporaries": self.temporaries, "outputs": self.outputs}
        whole = max(self.total, self.capacity or 0, 1)
        pieces = "".join(
            f'<span title="{name}: {format_bytes(size)}" style="display:inline-block;height:1.2em;'
            f'width:{100 * size / whole:.2f}%;background:{color}"></span>'
            for (name, size), color in zip(parts.items(), _COLORS, strict=False)
        )
        return f'<div style="border:1px solid #8888;line-height:0">{pieces}</div>'

    def __rich__(self) -> Any:
        """The renderable that rich prints."""
        from rich.console import Group
        from rich.text import Text

        return Group(self._table().rich(), *(Text(f"- {note}") for note in self._notes()))


_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#bbbbbb", "#dddddd", "#ee6677", "#aa3377")


@check_arguments(step=function, donate=count | integers)
def estimate(
    step: Callable, *args: Any, target: str | None = None, donate: int | Sequence[int] = ()
) -> Estimate:
    """Estimate the memory of step(*args) on each device, without running it.

    The step is compiled for the present backend, or for a chip that need not be here, and the
    buffers that the compiler assigns are added up. A context, libraries of kernels and
    fragmentation come on top, and no speed is known.

    Args:
      step: a function, or jax.jit of one, which then says itself what it donates.
      *args: its arguments: arrays or jax.ShapeDtypeStruct, on the mesh of their shardings. For a
        chip, a mesh of the same shape is made of it, and jax.sharding.AbstractMesh will do.
      target: None for the present backend, or "h100", "v5e", "v6e" or "v5p".
      donate: numbers of the arguments that the step may overwrite, as jax.jit's donate_argnums.

    Returns:
      An Estimate, in bytes on each device. str(), rich and notebooks show it as a table.

    Raises:
      ConfigError: donate names an argument that is not there, or the step is jitted and donate is
        given; the target is unknown, has no compiler here, or comes in no slice of as many chips
        as the shardings use; or the step holds devices of this machine.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda params, x: jnp.tanh(x @ params["w"]).sum()
    >>> params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    >>> found = estimate(step, params, jax.ShapeDtypeStruct((8, 256), jnp.float32))
    >>> found.groups["base"], found.arguments
    (262144, 270336)
    """
    numbers = tuple(donate) if isinstance(donate, Sequence) else (operator.index(donate),)
    if missing := [number for number in numbers if number not in range(len(args))]:
        raise ConfigError(
            f"donate names the argument {missing[0]}, but step is given {len(args)} arguments, "
            "numbered from 0"
        )
    jitted = step
    if not isinstance(step, jax.stages.Wrapped):
        jitted = jax.jit(step, donate_argnums=numbers)
    elif numbers:
        raise ConfigError(
            "step is jitted already, and says itself what it donates: leave out donate, or pass "
            "the function without jax.jit"
        )
    chip = None if target is None else find_chip(target)
    found = compile_step(jitted, args, chip)
    groups: dict[str, int] = dict.fromkeys((*GROUPS, "closed over", "padding"), 0)
    for size, group in zip(found.sizes, group_arguments(found.args), strict=True):
        groups[group] += size
    groups["closed over"], groups["padding"] = found.constants, found.padding
    return Estimate(
        arguments=sum(groups.values()),
        temporaries=found.temporaries,
        outputs=found.outputs,
        groups=groups,
        target=target or jax.default_backend(),
        devices=found.devices,
        capacity=chip and chip.memory,
        advice=list_advice(found, groups),
        collectives=found.collectives,
    )
