"""mpgpt: GPT inference over the machines people own."""

__version__ = "0.1.0"
