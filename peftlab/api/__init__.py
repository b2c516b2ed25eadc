"""The public functions, one file each, named after the function."""
