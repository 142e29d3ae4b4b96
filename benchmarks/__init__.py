"""Side-by-side measurements against published tables and against other tools.

`python -m benchmarks` lists them; `benchmarks/contract.py` says what each of them prints.
"""
