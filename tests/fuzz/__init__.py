"""Calls drawn at random of every public op, each held to the numerics contract or refused in our words.

    python -m tests.fuzz --calls 2000 --seed 0                              # through ATen
    TRITON_INTERPRET=1 python -m tests.fuzz --calls 500 --seed 0            # the kernels, interpreted
    python -m tests.fuzz --seed 0 --only-case 17                            # one of them again

forms: tensors by dtype, layout and values. calls: a call as data, and what the registry says an op's parameters are.
draw: calls from a seed. faults: arguments that are wrong. ways: how a function is called. check: what must hold of a call; numbers: how
results are compared.
shrink: the simplest call that fails alike. run: cases in processes of their own.
"""
