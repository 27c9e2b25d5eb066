"""The sandbox agent: a static C program that is PID 1 in every sandbox container.

`constants` holds the numbers that both sides of the protocol share, `build` compiles the program,
`binaries` gives what was compiled. The C is meant to be read in this order: ``constants.h``
(generated), ``wire.h``, ``agent.h``, ``agent.c``, ``gate.c``, ``exec.c``, ``keepers.c``,
``keeper.c``, ``leader.c``, ``identity.h``, ``tree.c``, ``transfer.c``, ``files.c``.
"""
