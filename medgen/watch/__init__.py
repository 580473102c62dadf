"""Looking at runs: state in truth order and the screens made from it. Reads only; called by the verbs watch and ls."""
