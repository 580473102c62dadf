"""Hand-written sbatch scripts become job specs: `run_import` is all that the import verb calls."""

from medgen.launch.importing.verb import run_import

__all__ = ["run_import"]
