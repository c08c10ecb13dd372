"""What the updates of MAML, FOMAML and Reptile contain, and how well outer steps along combinations of inner gradients learn.

Slide "Reptile", the expansions.
"""
