"""The invariant of programs.py: the lifted program is the dense program on the merged weight.

    python tests/support/algebra.py --seeds 0:2000

tries that range of seeds, and ends with the number of programs that broke the invariant and with
the operations at which others fell back to a dense weight. Each seed is one program, so a range can
be split and resumed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs import Program, program

import lowrank_jax as lowrank
from lowrank_jax import _codecs

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXACT, COARSE = 2e-4, 6e-2  # of the largest entry, or of 1: with and without bfloat16 on the way


@dataclasses.dataclass
class Verdict:
    """The result of one program: the operations that fell back, and how it broke the invariant.

    compiler: jitted, the dense program itself is another than run operation by operation, which the
    lifted one equals.
    """

    seed: int
    text: str
    fallbacks: tuple[str, ...]
    wrong: str = ""
    compiler: bool = False


def derivatives(run: Program, f: Any, short: bool) -> Any:
    """(adapter, s) -> the result and its gradient, or for some a directional derivative.

    short: for some no derivative at all.
    """
    if short and run.seed % 4 == 2:
        return lambda lora, s: (f(lora, s), ())

    def loss(lora: Any, s: Any) -> Any:
        out = f(lora, s).astype(jnp.float32)
        weights = (jnp.arange(out.size) % 5 - 2.0).reshape(out.shape)
        return jnp.sum(out * weights), out

    def forward(lora: Any, s: Any) -> Any:
        wave = lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
        tangent = jax.tree.map(wave, lora)
        pair = (lora, s), (tangent, jnp.float32(0.5))
        _, slope, out = jax.jvp(loss, *pair, has_aux=True)
        return out, slope

    def reverse(lora: Any, s: Any) -> Any:
        gradient, out = jax.grad(loss, (0, 1), has_aux=True)(lora, s)
        return out, gradient

    return reverse if run.reverse and run.seed % 4 else forward


def prepare(run: Program, short: bool = False) -> tuple[Any, Verdict]:
    """The two sides of the invariant as one function of (base, adapter, s), and what falls back."""
    fn = run.fn
    adapted = any(node is not None for node in run.lora.values())
    s = jnp.float32(1)

    def lifted(fallback: str) -> Any:
        live = lowrank.lift(fn, fallback=fallback)

        def of(base: Any, lora: Any, s: Any) -> Any:
            return live(lowrank.combine(base, lora, scale=run.scale) if adapted else base, s)

        return of

    report = lowrank.report(fn, lowrank.combine(run.base, run.lora) if adapted else run.base, s)
    built = [use for leaf in report.values() for use in leaf.uses if use.how == "materialized"]
    fallbacks = tuple(f"{use.primitive}: {use.reason}" for use in built)
    verdict = Verdict(run.seed, run.text, fallbacks)
    try:
        jax.eval_shape(lifted("raise"), run.base, run.lora, s)
        if fallbacks:
            verdict.wrong = "fallback='raise' let a dense weight pass"
    except lowrank.MaterializeError as error:
        if not fallbacks:
            verdict.wrong = f"fallback='raise' raised where nothing is built: {error}"
    live = lifted("silent")

    def merged(base: Any, lora: Any, s: Any) -> Any:
        dense = lowrank.merge(base, lora, scale=run.scale) if adapted else lowrank.dequantize(base)
        return fn(dense, s)

    def sides(base: Any, lora: Any, s: Any) -> Any:
        on = lambda f: lambda lora, s: f(base, lora, s)
        return [derivatives(run, on(f), short)(lora, s) for f in (live, merged)]

    return sides, verdict


def differences(got: Any, want: Any, bound: float) -> str:
    """Where two trees of arrays differ, or ""."""
    names = ["result", *("derivative " + str(i) for i in range(20))]
    leaves = [jax.tree.leaves(side) for side in (got, want)]
    for name, one, other in zip(names, *leaves, strict=False):
        own = max(bound, 2 * float(jnp.finfo(one.dtype).eps))
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        largest = max(np.abs(other).max(initial=0), 1)
        if one.shape != other.shape or not np.all(np.abs(one - other) <= own * largest):
            return f"{name}: {one.ravel()[:4]} where it is {other.ravel()[:4]}"
    return ""


def judge(seeds: Sequence[int], together: int = 20, short: bool = False) -> list[Verdict]:
    """Verdicts on programs, many compiled as one; short: on values alone for a quarter of them."""
    verdicts, batch = [], []
    for number, seed in enumerate(seeds):
        run = program(seed)
        try:
            sides, verdict = prepare(run, short)
            batch.append((run, sides, verdict))
        except Exception as error:
            verdict = Verdict(seed, run.text, (), _said(error))
        verdicts.append(verdict)
        if len(batch) == together or number == len(seeds) - 1:
            _run(batch)
            batch = []
    return verdicts


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _run(batch: list[Any]) -> None:
    """Compile and run some programs as one; note where the sides differ."""
    if not batch:
        return
    all_sides = lambda args, s: [own(*one, s) for (_, own, _), one in zip(batch, args, strict=True)]
    args = [(run.base, run.lora) for run, _, _ in batch]
    try:
        run_all = jax.jit(all_sides, compiler_options=QUICK)
        found = jax.device_get(run_all(args, jnp.float32(1)))
    except Exception as error:
        if len(batch) == 1:
            batch[0][2].wrong = _said(error)
        else:  # one of them cannot be traced: find out which
            for one in batch:
                _run([one])
        return
    for (run, own, verdict), (got, want) in zip(batch, found, strict=True):
        bound = COARSE if run.coarse else EXACT
        unlike = differences(got, want, bound)
        if unlike:  # each operation compiled by itself
            with jax.disable_jit():
                _, want = own(run.base, run.lora, jnp.float32(1))
            verdict.compiler = not differences(got, jax.device_get(want), bound)
        verdict.wrong = verdict.wrong or unlike * (not verdict.compiler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:2000", help="first:last+1")
    parser.add_argument("--all", action="store_true", help="print each program that falls back")
    args = parser.parse_args()
    first, last = map(int, args.seeds.split(":"))
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    warnings.simplefilter("ignore")
    _codecs.formats.BLOCK_SIZES = (2, 32, 64)
    fell: collections.Counter = collections.Counter()
    wrong, dense, compiled, start = 0, 0, 0, time.monotonic()
    for begin in range(first, last, 100):
        for verdict in judge(range(begin, min(begin + 100, last))):
            fell.update({line.split(":")[0] for line in verdict.fallbacks})
            dense += bool(verdict.fallbacks)
            if verdict.compiler:
                compiled += 1
                print(
                    f"seed {verdict.seed}: JAX compiles the dense program wrongly: {verdict.text}"
                )
            if verdict.wrong:
                wrong += 1
                print(f"seed {verdict.seed}: {verdict.wrong}\n    {verdict.text}", flush=True)
            elif args.all and verdict.fallbacks:
                print(f"seed {verdict.seed} falls back: {verdict.fallbacks}\n    {verdict.text}")
        jax.clear_caches()
        done = min(begin + 100, last) - first
        print(f"{done} programs, {wrong} wrong, {time.monotonic() - start:.0f} s", flush=True)
    print(f"JAX {jax.__version__}: {last - first} programs, {wrong} wrong, {compiled} where JAX is")
    print(f"{dense} partly dense:")
    for name, count in fell.most_common():
        print(f"  {count:5} {name}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
