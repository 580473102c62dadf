"""From a raw cohort to files for training: match groups, split by subject, stack slices. One module per verb; called by cli.py."""
