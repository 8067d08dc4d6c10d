"""Do the rates that are best for a narrow model stay best for a wide one? Rates x widths x seeds, on real text.

    python -m scripts.mup_transfer --widths=128,256,512,1024 --control
    python -m scripts.mup_transfer --widths=128,256,512,1024 --control --optimizer=adamw --out=DIR
    python -m scripts.mup_transfer --widths=128,256,512,1024 --out=DIR --report-only
    python -m scripts.mup_transfer --widths=256,512 --compare-runs=TAG256,TAG512      two runs of base_train

Runs of one seed see the same new text in the same order, whatever their width, rate and parametrisation. No weight
decay, no gradient clipping, windows at full length; schedule and initialisation are those of --arch. The result is the
loss on validation rows. Finished runs are not repeated; several processes with the same --out share them, one a GPU or
several on one, which narrow models leave idle.

--control trains the standard parametrisation with the base width's rates at every width. One that is to fail takes
--optimizer=adamw, or Muon with --sweep=head (docs/decisions.md says why).
"""

from nanochat import cli
from nanochat.studies.flags import TransferSettings as Settings

if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

from nanochat.studies.mup_transfer import main

if __name__ == "__main__":
    cli.run(main, Settings)
