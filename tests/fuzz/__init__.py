"""Random calls of the public functions: valid ones against float64, invalid ones must be refused by name.

    python -m tests.fuzz --seconds 60 --device cpu

A call is text (`call.py`): what runs is what a failure prints. `valid.py` writes valid calls with `draft.py`,
`wrong.py` changes one thing in them, and `check.py` judges them, by the formula in `formula.py`.
"""
