"""Checkpoints: read a network from any layout, write it in any format.

Comes in: a file, whoever wrote it. Goes out: an encoder with what its file says of it (`load`), or
a file for somebody else's code (`export`). Nothing is unpickled or fetched.
"""
