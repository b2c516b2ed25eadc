"""The protocol of a benchmark: the defaults of ``peftlab bench``."""

REPEATS, NEW_TOKENS = 5, 32
# Steps per repetition: a GPU's steps are short, and its first ones compile.
STEPS = {"cpu": 4, "cuda": 20}
WARM_UP = {"cpu": 1, "cuda": 5}
# Length of a row in tokens if neither --length nor data.max_length is set.
LENGTH = {"cpu": 128, "cuda": 1024}
BATCH = 8
# Trainings per method with --quality.
SEEDS = 3

# A search for a learning rate goes at most this many rates beyond those that it begins with.
MOST_RATES_BEYOND = 4
