"""Do the rates that are best for a narrow model stay best for a wide one? Rates x widths x seeds, on real text.

    python -m scripts.mup_transfer --widths=128,256,512,1024 --control
    python -m scripts.mup_transfer --widths=128,256,512,1024 --control --optimizer=adamw --out=DIR
    python -m scripts.mup_transfer --widths=128,256,512,1024 --out=DIR --report-only
    python -m scripts.mup_transfer --widths=256,512 --compare-runs=TAG256,TAG512      two runs of base_train

Every step of a run sees new text, and runs of one seed see the same text in the same order, whatever their width, rate
and parametrisation: what differs between two of them is not their data. Each finished run is written to DIR/runs.jsonl
at once and not repeated when the same command is given again. Several processes with the same --out share the runs: one
a GPU, or several on one, which narrow models leave idle most of the time. The result is the loss on validation rows,
the same for all. No weight decay, no gradient clipping, windows at full length; schedule and initialisation are those
of --arch.

The control (--control) is the standard parametrisation with the rates of the base width at every width, since that is
what "the same learning rate" means without muP. At the base width the two are the same model with the same rates, so
those runs are shared. What the control can show depends on the optimizer. Under AdamW (--optimizer=adamw) the matrices
want rates that go with 1/width, and so does the optimum of all rates together: 3 log2 from 128 to 1024. Muon's updates
have a norm that does not depend on width, and matrices that keep their aspect want no factor; of the large groups only
the head has a wrong rate then. The optimum of all rates is a compromise that moves less; that of the head alone
(--sweep=head) goes with 1/width. So a control that is to fail takes --optimizer=adamw, or Muon with --sweep=head.
"""

from nanochat import cli
from nanochat.studies.mup_transfer import Settings, main

if __name__ == "__main__":
    cli.run(main, Settings)
