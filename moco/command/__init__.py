"""Command: from a command line to a call, and starting the processes that answer it.

Comes in: words of a command line, YAML recipes. Goes out: checked settings, exit codes, one line
per error. No room here imports torch; what a command runs is imported when its settings stand.
"""
