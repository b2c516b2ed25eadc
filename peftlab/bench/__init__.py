"""Measuring on this machine what later runs then use."""
