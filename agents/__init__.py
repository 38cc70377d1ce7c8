"""Agents: durable LangGraph graphs that play roles; see docs/architecture.md."""

import os

# Checkpoints hold plain JSON types only; refuse anything else instead of guessing. LangGraph reads
# this when it is imported.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
