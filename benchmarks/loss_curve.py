"""Run the main job and draw its losses: the picture of the README.

    python benchmarks/loss_curve.py [--draw-only]

The run takes about five minutes on two cores. Its losses are kept in docs/images/finetune.json,
from which --draw-only draws docs/images/finetune.svg again. Matplotlib is in the extra `notebooks`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "examples"))

import finetune  # noqa: E402  found by the line above
from flags import parse  # noqa: E402

WINDOW = 8  # steps of the mean: a batch is small, and its loss depends on its text
TEXTS = {"held out": "The Devil's Dictionary, held out", "other": "Python's documentation"}


def run():
    """Run the main job; return its losses by step, and of each text before and after."""
    with tempfile.TemporaryDirectory() as folder:
        measured = finetune.run(parse(["--out", str(Path(folder) / "adapter")]), Console())
    return {
        "steps": [loss for _, loss in sorted(measured["losses"].items())],
        "texts": {name: [stage[name] for stage in measured["stages"].values()] for name in TEXTS},
    }


def draw(losses, path):
    """Draw the loss of each step, and two bars for each text."""
    mpl.rcParams.update({"svg.hashsalt": "finetune", "font.size": 10, "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=[1.4, 1], facecolor="white"
    )
    steps = np.arange(1, len(losses["steps"]) + 1)
    left.plot(steps, losses["steps"], color="#9aa4b2", linewidth=1, label="each step")
    means = np.convolve(losses["steps"], np.ones(WINDOW) / WINDOW, "valid")
    left.plot(steps[WINDOW - 1 :], means, color="#1f6feb", linewidth=2.2, label="mean of eight")
    left.legend(frameon=False)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="training batches")
    for place, (name, label) in enumerate(TEXTS.items()):
        before, after = losses["texts"][name]
        for offset, loss, color in ((-0.17, before, "#9aa4b2"), (0.17, after, "#1f6feb")):
            bar = right.barh(place + offset, loss, 0.32, color=color)
            right.bar_label(bar, [f"{loss:.3f}"], padding=3)
        right.text(0.05, place - 0.38, label, fontsize=9)
    right.set(xlabel="loss (nats per token)", title="before (gray) and after (blue)", yticks=[])
    right.set(xlim=(0, 1.15 * max(map(max, losses["texts"].values()))), ylim=(1.45, -0.6))
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw-only", action="store_true", help="draw the kept losses")
    options = parser.parse_args()
    kept = IMAGES / "finetune.json"
    IMAGES.mkdir(parents=True, exist_ok=True)
    if not options.draw_only:
        kept.write_text(json.dumps(run(), indent=1) + "\n")
    draw(json.loads(kept.read_text()), IMAGES / "finetune.svg")


if __name__ == "__main__":
    main()
