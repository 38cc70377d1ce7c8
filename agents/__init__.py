"""Agents: durable LangGraph graphs that play roles; see docs/architecture.md."""
