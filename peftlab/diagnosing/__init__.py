"""Finding out what works on this machine."""
