"""Training: one run, from its settings to a trained encoder in a run directory.

Comes in: checked settings. Goes out: checkpoints, metrics, a result. `run` is the page to start
with; the other rooms are what it puts together: decisions, monitors, guards, saving, logging.
"""
