"""Few-shot meta-learning: tensors in, tensors out. Start at `types.py`, then `algorithms/maml.py`."""
