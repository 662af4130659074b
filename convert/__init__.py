"""Published checkpoints <-> our parameters; see `python -m convert --help`."""

from convert.exporting import export as export
from convert.importing import load as load
