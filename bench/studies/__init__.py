"""One program per study, ``python -m bench.studies.NAME``: costs and gains of peftlab's own choices."""
