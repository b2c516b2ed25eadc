"""What exists, as rows without code: tasks, adapter methods, losses, metrics, optimizers, schedules, kernel modes, storages.

Nothing here imports torch, or anything of peftlab but ``errors``. The choices of a recipe, their messages, the command line's
help, the JSON Schema, the dimensions and colours of the benchmark and the tables of the documentation come from these rows.
A row names what implements it; the room that holds the implementation loads it.
"""
