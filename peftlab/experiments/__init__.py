"""Sets of trainings that belong together and can be resumed: a distillation's students, their baselines and their phases."""
