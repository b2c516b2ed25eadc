"""Benchmarks on this machine, and kernel plans for later runs."""
