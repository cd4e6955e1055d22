"""What a 4-bit base costs a reinforcement-learning run, and how much of it noise gives back.

`python -m benchmarks.recovery demo` trains a small language model on word problems in several arms;
`python -m benchmarks.recovery --help` lists the other commands.
"""
