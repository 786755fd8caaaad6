"""The block network: its modules, the fast forms of mixing, shapes and FLOPs."""
