"""Speed as ratios within one run. `make bench` runs all and writes results/<date>.json; nothing here is a test."""
