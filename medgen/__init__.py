"""medgen: synthetic medical images from one job spec, on Slurm or on one machine.

Importing the package costs nothing: no module here imports torch until a stage runs."""

__version__ = "0.1.0"
