"""The time and memory that a meta-gradient takes, against the number of inner steps.

Slide "Complexity" (iMAML), the figure's right half.
"""
