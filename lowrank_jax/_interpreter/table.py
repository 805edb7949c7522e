"""The table of operations: primitive name -> its rules.

To support another primitive, add a row. If weights and views have a method of the same name, one
function serves both: `"roll": make_structural(lambda eqn, w: w.roll(...))`.
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
