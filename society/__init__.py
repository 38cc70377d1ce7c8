"""Society: a research society of agents that believe only what survives replication."""

__version__ = "0.1.0"
