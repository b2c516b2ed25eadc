"""The protocol of a benchmark: what ``peftlab bench`` does unless it is told otherwise."""

REPEATS, NEW_TOKENS = 5, 32
# Steps of a repetition: a GPU's are short, and its first ones compile.
STEPS = {"cpu": 4, "cuda": 20}
WARM_UP = {"cpu": 1, "cuda": 5}
# A row's length in tokens where neither --length nor data.max_length says.
LENGTH = {"cpu": 128, "cuda": 1024}
BATCH = 8
# Trainings of each method with --quality.
SEEDS = 3
