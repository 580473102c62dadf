"""Differential privacy as numbers: what a training on private records costs, and what it must add to cost no more.

Knows mechanisms and budgets, no model, no data: accounting.py, budget.py, card.py, ceiling.py. Used by private families and `medgen privacy`."""
