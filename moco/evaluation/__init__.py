"""Evaluation: how good an encoder is, by neighbours, by a linear classifier, by fine-tuning.

Comes in: an encoder and labelled images. Goes out: scores as plain values. `judge` holds the two
mains, `subject` opens what they judge, `protocols` says how it is scored; the other rooms are pure
functions of features and labels wherever they can be.
"""
