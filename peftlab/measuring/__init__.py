"""Measuring: time, memory, energy and FLOPs, the machine and its ceilings, intervals, journals, pictures."""
