"""`python -m medgen`: the same entry point as the console script; job scripts call it."""

from medgen.cli import main

if __name__ == "__main__":
    main()
