"""Evaluation: how good an encoder is, by neighbours, by a linear classifier, by fine-tuning.

Comes in: an encoder and labelled images. Goes out: scores as plain values. `judge` holds the two
mains, `subject` opens what they judge, `protocols` says how it is scored, `verdict` compares it
with what needs no training; the other rooms are pure functions wherever they can be.
"""
