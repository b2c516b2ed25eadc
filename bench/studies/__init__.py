"""One program a study, ``python -m bench.studies.NAME``: what peftlab's own choices cost and gain."""
