"""Checks what works on this machine."""
