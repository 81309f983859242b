"""The architecture: the travelling core, copied to the Hub with the weights.

Flat and closed: its files import torch, transformers, the standard library and each other, nothing else.
"""
