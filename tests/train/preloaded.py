"""Imported by the server that children are forked from: what it holds is left out of every collection of garbage."""

import gc

import tests.train.support  # noqa: F401

gc.collect()
gc.freeze()
