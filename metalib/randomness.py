"""Every draw of the project takes its own generator, made from a seed and the purpose of the draw."""

import hashlib

import torch


def generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator on `device` that depends on the seed and on every word of the purpose, and on nothing else."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
