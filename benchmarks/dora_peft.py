"""PEFT's own DoRA step against its LoRA step, for the sizes and the model of dora.py.

Run on a quiet machine, in an environment with torch 2.13.0 (CPU) and peft 0.21.2:
python benchmarks/dora_peft.py [--rank 16] [--repeat 15]

The step is loss, gradient and AdamW over the adapters, in float32; forward is without gradients, in
evaluation mode. All are timed in turn within one process; printed are medians, and their ratios to
LoRA's.
"""

import argparse
import copy
import statistics
import time

import peft
import torch
from torch import nn

LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """flops.py's decoder block."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.q, self.k, self.v, self.o = (linear(dim, dim) for _ in range(4))
        self.gate, self.up = linear(dim, hidden), linear(dim, hidden)
        self.down = linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, t, d] -> [b, t, d]."""
        heads = 4
        b, t, d = x.shape
        norm = lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        h = norm(x)
        split = lambda y: y.reshape(b, t, heads, -1)
        q, k, v = split(self.q(h)), split(self.k(h)), split(self.v(h))
        scores = torch.einsum("bthc,bshc->bhts", q, k) * (d // heads) ** -0.5
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -1e30)
        mixed = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).reshape(b, t, -1)
        x = x + self.o(mixed)
        h = norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Blocks one after another, and a head."""

    def __init__(self, layers: int, dim: int, hidden: int, vocab: int):
        super().__init__()
        self.layers = nn.Sequential(*(Block(dim, hidden) for _ in range(layers)))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, t, d] -> logits."""
        return self.head(self.layers(x))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = Model(args.layers, args.dim, args.hidden, 512)
    x = torch.randn(args.batch, args.tokens, args.dim)
    y = torch.zeros(args.batch * args.tokens, dtype=torch.long)

    def adapted(dora: bool):
        config = peft.LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEARS, use_dora=dora
        )
        return peft.get_peft_model(copy.deepcopy(dense), config)

    def train_step(model):
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)

        def step():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
            optimizer.step()

        return step

    def forward(model):
        model.eval()
        return torch.no_grad()(lambda: model(x))

    for title, made in (("step", train_step), ("forward", forward)):
        steps = {name: made(adapted(name == "dora")) for name in ("lora", "dora")}
        times = {name: [] for name in steps}
        for number in range(args.repeat + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if number:
                    times[name].append(time.perf_counter() - start)
        limit = statistics.median(times["lora"])
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"{title:8}{name:6} {middle * 1e3:8.1f} ms, {middle / limit:.3f} of LoRA's")


if __name__ == "__main__":
    main()
