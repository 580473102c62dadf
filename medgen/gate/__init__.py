"""The quality gate: which generated images look like no training slice, by rules that can be checked by eye. Used by generate.py and collect.py.

measures.py one image; subspace.py how well known shapes explain it; bounds.py what training slices have; fit.py both from a store; judge.py the verdict."""
