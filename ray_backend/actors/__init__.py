"""What runs inside an instance's process: the compiled actor class and the host of user code.

These modules are imported by every worker that starts an instance, so they stay light: neither
pydantic nor the API's own modules beyond `apothic.errors`.
"""
