"""Command: from a command line to a call, and the start of several ranks of it.

Comes in: words of a command line and YAML recipes. Goes out: results as one line of JSON, exit
codes, and errors of one line. No room here imports torch before the settings have been checked.
"""
