"""A small decoder that runs under explicit sharding as well as under automatic."""

import jax
import jax.numpy as jnp
from jax import P, lax

EXPLICIT_SPECS = {
    "embed": P("model", "data"),
    "layers": {
        "q": P(None, "data", None, "model"),
        "o": P(None, None, "model", "data"),
        "up": P(None, "data", "model"),
        "down": P(None, "model", "data"),
    },
    "mix": P(None, "data", "model"),
}


def explicit_model(explicit, p, ids):
    """Look-up, attention-like n-D products, MLP in scan + remat, a convolution, the tied head."""
    gather = jax.sharding.reshard if explicit else lambda w, spec: w
    out = {"out_sharding": P("data", None, None)} if explicit else {}

    def layer(x, w):
        q = jnp.einsum("btd,dhk->bthk", x, gather(w["q"], P(None, None, "model")))
        o = gather(w["o"], P(None, "model", None))
        x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(q), o, **out)
        h = jnp.tanh(x @ gather(w["up"], P(None, "model")))
        return x + jnp.einsum("btf,fd->btd", h, w["down"], **out), None  # split both ways

    x = p["embed"].at[ids].get(**out)
    x, _ = lax.scan(jax.checkpoint(layer), x, p["layers"])
    mix = gather(p["mix"], P(None, None, None))
    x = lax.conv_general_dilated(x, mix, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.einsum("btd,vd->btv", x, gather(p["embed"], P("model", None)))
