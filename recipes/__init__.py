"""Recipes that ship with peftlab, installed as ``peftlab.recipes``."""
