"""One small script per question; python -m experiments.NAME runs it, its docstring says the question."""
