"""Sandboxes on Docker: the session actor, the engine adapter, image builds and the agent."""
