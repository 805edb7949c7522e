"""Fingerprints of compiled train steps: two trees of the library compile the same programs or not.

Run: python benchmarks/program_hashes.py [--layers 2]

For LoRA, DoRA, NF4 and int8 bases, layers unrolled and scanned with remat: a hash of the optimized
HLO without metadata and names, one of the jaxpr, FLOPs and bytes of the cost analysis, and bytes of
temporaries. Run it before and after a change of structure, under the same JAX, and compare.
"""

import argparse
import hashlib
import re

import jax
import optax
from trace_cost import loss_of, shapes

import lowrank_jax as lowrank

KINDS = {
    "LoRA": (None, {}),
    "DoRA": (None, {"dora": True}),
    "NF4": ({"format": "nf4", "block_size": 32, "double_quant": False}, {}),
    "NF4, double, DoRA": ({"format": "nf4", "block_size": 32}, {"dora": True}),
    "int8": ({"format": "int8", "block_size": 32, "double_quant": False}, {}),
}


def without_names(text: str) -> str:
    """HLO or a jaxpr's text whose names are numbered in order of appearance, without metadata."""
    text = re.sub(r",? ?(metadata|frontend_attributes)=\{[^{}]*\}", "", text)
    text = re.sub(r"^HloModule .*$", "", text, flags=re.M)
    text = re.sub(
        r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text, flags=re.M
    )
    numbers: dict[str, int] = {}
    number = lambda name: f"%{numbers.setdefault(name.group(0), len(numbers))}"
    return re.sub(r"%[\w.-]+", number, text)


def step_of(apply, optimizer):
    """One update of the adapters."""

    def step(lora, base, state, tokens):
        loss = lambda lora: loss_of(lowrank.lift(apply))(lowrank.combine(base, lora), tokens)
        value, gradient = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, value

    return step


def fingerprint(kind: str, scanned: bool, layers: int) -> tuple[str, ...]:
    """The hashes of one case."""
    quant, options = KINDS[kind]
    apply, params, tokens = shapes(layers, scan=scanned, remat=scanned)
    plan = lowrank.plan(apply, params, tokens)
    config = lowrank.LoraConfig(rank=8, **options)

    def make(params):
        if quant:
            params = lowrank.quantize(params, lowrank.QuantConfig(**quant), plan=plan)
        return lowrank.init(jax.random.key(0), params, config, plan=plan)

    base, lora = jax.eval_shape(make, params)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, lora)
    traced = jax.jit(step_of(apply, optimizer)).trace(lora, base, state, tokens)
    compiled = traced.lower().compile()
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    figures = [f"{cost[name]:.0f}" for name in ("flops", "bytes accessed")]
    return (digest(without_names(compiled.as_text())), *figures, str(temporaries))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    layers = parser.parse_args().layers
    print(f"JAX {jax.__version__}, {jax.default_backend()}: HLO, FLOPs, bytes, temporaries")
    for kind in KINDS:
        for scanned in (False, True):
            name = f"{kind}, {'scanned with remat' if scanned else 'unrolled'}"
            print(f"{name:40}", *fingerprint(kind, scanned, layers), flush=True)


if __name__ == "__main__":
    main()
