"""Everything that talks to Docker: engine, containers, streams, images, networks, sweeping.

`connection.Engine` is the way in. docker-py stays inside this package and blocks: call it from a
thread. `launch.launch` and `attach.AttachedStream` are for the session's event loop.
"""
