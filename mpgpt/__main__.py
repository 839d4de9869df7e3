"""``python -m mpgpt``: the same program by another door. Knows where the command line begins, and nothing else."""

from mpgpt.commands.cli import main

main()
