"""PACGAN: images of chosen classes from a generator that grows with its critic."""
