"""Distributed training of block networks, with the same weights, bit for bit, on any number of workers."""

__version__ = "0.1.0"

import os

launcher = os.getppid()  # noted before the imports take their time, in which it may die
