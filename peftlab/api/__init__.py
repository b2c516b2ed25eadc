"""Everything the command line does, as functions."""
