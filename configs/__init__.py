"""The shipped profiles: one YAML file per task and size, read by `society.experiments.task`."""
