"""Coordinate check: the size of activations against width, before and while models learn.

    python -m scripts.coord_check --widths=128,256,512,1024 --steps=10 --seeds=5
    python -m scripts.coord_check --no-mup
    python -m scripts.coord_check --from=w256,w512,w1024

Small models on a Markov chain, in fp32, no weight beginning at zero. Prints the slopes of log2 mean |x| against log2
width; writes coord_check.json and coord_check.svg. Exit code 1 where bars are missed. --from compares what runs of
base_train --coord-check left.
"""

from nanochat import cli
from nanochat.studies.flags import CoordCheckSettings as Settings

if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

from nanochat.studies.coord_check import main

if __name__ == "__main__":
    cli.run(main, Settings)
