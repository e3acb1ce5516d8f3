"""What torch is told of an op: its registration, argument checks, autograd, the fast path, compile, sharding, FLOPs."""
