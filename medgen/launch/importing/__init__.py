"""Hand-written sbatch scripts become job specs: `run_import` is what the import verb calls for them."""

from medgen.launch.importing.verb import run_import

__all__ = ["run_import"]
