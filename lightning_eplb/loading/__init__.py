"""Weights from a checkpoint's files, of which each rank reads what it holds."""
