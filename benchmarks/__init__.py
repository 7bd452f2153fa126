"""Benchmarks: each file is a command; a package, since others install one of this name."""
