"""Groups of trainings that can be resumed: the students, baselines and phases of a distillation."""
