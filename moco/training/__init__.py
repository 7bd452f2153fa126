"""Training: one run, from its settings to a trained encoder in a run directory.

Comes in: checked settings. Goes out: checkpoints, metrics, a result. `run` is the page to start
with: it shows the order in which the other rooms decide, build, announce, watch, guard and save.
"""
