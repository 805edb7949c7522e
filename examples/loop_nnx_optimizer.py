"""The usual NNX loop: an unmodified module, nnx.Optimizer and nnx.value_and_grad.

    python examples/loop_nnx_optimizer.py

A module is a pytree: `plan`, `init`, `combine` and `lift` take it as it is, and `combine` returns a
module of the same class. To a loop of full training two words are added: `lift` around the loss and
`only_adapters` around the optimizer. The step is given model and optimizer for good (donated), the
base with them: `partition` gives it back in the end.

A lifted call is pure, as under jax.jit. One that would change the module (dropout's counters, batch
statistics) raises a StateError that names what it would change: call `model.eval()` first, or take
`lowrank.functional_with_state(model)`, whose function returns the new state. Its parameters, like
those of `lowrank.functional(model)`, are for the loop over two trees (loop_two_trees.py).
"""

from collections.abc import Sequence
from functools import partial

import characters
import jax
import optax
from flax import nnx

import lowrank_jax as lowrank


class ConvNet(nnx.Module):
    """Dilated causal convolutions, after ByteNet (arXiv 1610.10099): it sees 31 characters back."""

    def __init__(self, rngs: nnx.Rngs, dim: int = 64, layers: int = 4):
        self.embed = nnx.Embed(characters.VOCAB, dim, rngs=rngs)
        self.convs, self.downs, self.norms = nnx.List(), nnx.List(), nnx.List()
        for i in range(layers):
            width = {"kernel_size": 3, "kernel_dilation": 2**i, "padding": "CAUSAL"}
            self.convs.append(nnx.Conv(dim, 2 * dim, **width, rngs=rngs))
            self.downs.append(nnx.Linear(2 * dim, dim, rngs=rngs))
            self.norms.append(nnx.LayerNorm(dim, rngs=rngs))
        self.head = nnx.Linear(dim, characters.VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [b, t] to logits [b, t, VOCAB] of the next ones."""
        x = self.embed(tokens)
        for conv, down, norm in zip(self.convs, self.downs, self.norms, strict=True):
            x = x + down(nnx.gelu(conv(norm(x))))
        return self.head(x)


def loss_of(model: ConvNet, tokens: jax.Array) -> jax.Array:
    return characters.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def main(arguments: Sequence[str] | None = None):
    steps = characters.steps_asked(arguments, default=300)
    model = characters.pretrain(ConvNet.__call__, ConvNet(nnx.Rngs(0)))
    before = characters.held_out_loss(ConvNet.__call__, model)

    plan = lowrank.plan(ConvNet.__call__, model, characters.EXAMPLE)
    config = lowrank.LoraConfig(rank=8, targets="all-linear")
    model = lowrank.combine(*lowrank.init(jax.random.key(0), model, config, plan=plan))
    print(lowrank.report(ConvNet.__call__, model, characters.EXAMPLE))

    tx = lowrank.only_adapters(optax.adamw(optax.cosine_decay_schedule(1e-2, steps)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, tokens):
        lifted = lowrank.lift(loss_of, fallback="raise")
        loss, grads = nnx.value_and_grad(lifted)(model, tokens)
        optimizer.update(model, grads)
        return loss

    train_ids, _ = characters.target()
    for tokens in characters.batches(train_ids, steps, "adapting"):
        loss = step(model, optimizer, tokens)

    base, lora = lowrank.partition(model)
    after = characters.held_out_loss(ConvNet.__call__, lowrank.merge(base, lora))
    characters.show_change(before, after)
    print(f"loss of the last step: {loss:.3f}")
    return before, after, base, lora, optimizer.opt_state


if __name__ == "__main__":
    main()
