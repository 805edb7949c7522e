"""Collectives are counted from the text of compiled programs, as several compilers write it."""

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import lowrank_jax as lowrank
from lowrank_jax._estimate.collectives import count_collectives

# as the GPU's compiler writes: what start returns holds the operands too
STARTED = """
%body (p: (s32[], u8[4])) -> (s32[], u8[4]) {
  %start = ((u8[4]{0}, f32[2]{0}), (u8[32]{0}, f32[16]{0})) all-gather-start(%x, %y), channel_id=1
  %done = (u8[32]{0}, f32[16]{0}) all-gather-done(%start), metadata={op_name="all-gather"}
}

%condition (p: (s32[], u8[4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.1_spmd (x: u8[4]) -> u8[4] {
  %w = (s32[], u8[4]) while(%t), condition=%condition, body=%body, backend_config={TRIPS}
}
"""
# as the TPU's: a collective is in each of the fusions that run while it does
FUSED = """
%first (p: u4[8,64]) -> u4[64,64] {
  %a.1 = u4[64,64]{1,0:T(8,128)E(4)} all-gather(%p), channel_id=7, dimensions={0}
}

%second (p: u4[8,64]) -> u4[64,64] {
  %a.2 = u4[64,64]{1,0:T(8,128)E(4)} all-gather(%p), channel_id=7, dimensions={0}
}

%region (p: s32[]) -> s32[] {
  %f.1 = u4[64,64] fusion(%x), kind=kCustom, calls=%first
  %f.2 = u4[64,64] fusion(%x), kind=kCustom, calls=%second
  ROOT %r = bf16[8]{0} all-reduce(%z), channel_id=8, to_apply=%add
}

%limit (p: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main (x: u4[8,64]) -> s32[] {
  ROOT %w = s32[] while(%x), condition=%limit, body=%region
}
"""


def test_what_a_loop_does_is_counted_as_often_as_it_runs():
    known = STARTED.replace("TRIPS", '"known_trip_count":{"n":"3"}')
    assert count_collectives(known) == {"all-gather f32": 3 * 64, "all-gather u8": 3 * 32}
    unknown = STARTED.replace("TRIPS", "")
    assert count_collectives(unknown) == {"all-gather f32": 64, "all-gather u8": 32}


def test_one_collective_in_several_fusions_is_one():
    want = {"all-gather u4": 5 * 64 * 64 // 2, "all-reduce bf16": 5 * 16}
    assert count_collectives(FUSED) == want


def test_generic_operations_are_followed_once():
    text = """
%wrapped (p: f32[4]) -> f32[8] {
  ROOT %a = f32[8]{0} all-to-all(%p), channel_id=1
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %s = ((f32[4]), f32[8], u32[]) async-start(%x), calls=%wrapped
  ROOT %d = f32[8]{0} async-done(%s), calls=%wrapped
}
"""
    assert count_collectives(text) == {"all-to-all f32": 32}


@pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices")
def test_a_product_over_a_mesh_brings_its_weight_or_its_sum():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    shape = lambda *size, spec: jax.ShapeDtypeStruct(
        size, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    w = shape(3, 64, 64, spec=P(None, None, "d"))
    whole = lambda x: jax.lax.with_sharding_constraint(x, P())
    layers = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, w)[0]
    found = lowrank.estimate(layers, w, shape(8, 64, spec=P("d")))
    assert found.collectives == {"all-gather f32": 3 * 64 * 64 * 4}
    assert "all-gather f32" in str(found)
    sum_of = lambda x: x.sum()
    assert lowrank.estimate(sum_of, shape(8, 64, spec=P("d"))).collectives == {"all-reduce f32": 4}
    assert lowrank.estimate(sum_of, jnp.ones(8)).collectives == {}
