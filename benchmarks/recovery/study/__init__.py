"""What the result files of the recovery study say: checked rows, intervals, tables, figures and verdicts.

Nothing here runs a model; everything is computed from `benchmarks/results/recovery/*.jsonl`.
"""
