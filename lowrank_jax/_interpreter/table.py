"""The table of operations: one row for each primitive that has a rule or a kind of its own.

To teach the library a primitive, add a row. Where a weight and a view take it alike, one function
does: `"roll": structural(lambda equation, w: w.roll(...))`.
"""

from __future__ import annotations

from lowrank_jax._interpreter.calls import CALLS
from lowrank_jax._interpreter.elementwise import ELEMENTWISE, survey_any
from lowrank_jax._interpreter.operation import Operation
from lowrank_jax._interpreter.products import PRODUCTS
from lowrank_jax._interpreter.structural import STRUCTURAL

OPERATIONS: dict[str, Operation] = {
    **STRUCTURAL,
    **ELEMENTWISE,
    **PRODUCTS,
    **CALLS,
    "": Operation(survey=survey_any),  # any other primitive
}
