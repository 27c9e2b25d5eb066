"""Sandbox sessions in containers."""
