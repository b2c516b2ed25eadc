"""Registries as data without code: tasks, adapter methods, losses, metrics, optimizers, schedules, kernel modes, storages.

Nothing here imports torch, or any part of peftlab except ``errors``. Recipe choices, error messages, command-line help, the
JSON Schema, the dimensions and colours of the benchmark and the tables of the documentation come from these rows. A row
names its implementation; the package with the implementation loads it.
"""
