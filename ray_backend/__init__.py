"""The engine behind `apothic` on Ray: it implements `apothic.backend` with actors and Docker."""
