"""Checkpoints: read a network from any layout, write it in any format. No code in a file is run.

Comes in: a file, whoever wrote it. Goes out: an encoder with what its file says of it (`load`), the
state that a new run starts from (`start`), or a file for somebody else's code (`export`). The first
two call `read` (file to dict), `layouts` (names to ours), `architecture` (which network) and
`matching` (tensors to network); `export` calls `load`,
`write`, `graphs` and `official` (network to files), `describe` and `model_card` (what they say of
it). `preparation` tells, and does, what makes an image a network's input.
"""
