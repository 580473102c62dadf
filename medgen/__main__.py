"""`python -m medgen`: the same entry point as the console script; job scripts call it."""

import sys

from medgen.stop import listen_early

if sys.argv[1:2] in (["train"], ["generate"], ["collect"], ["features"], ["evaluate"], ["structure"], ["utility"], ["report"]):
    listen_early()  # before anything that takes time to import

from medgen.cli import main

if __name__ == "__main__":
    main()
