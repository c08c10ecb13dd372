"""Leap and its rivals on whole alphabets (slide "Omniglot Comparison").

Flennerhag et al., ICLR 2019, https://arxiv.org/abs/1812.01054, section 4.1 and figure 3; github.com/amzn/metalearn-leap. A
task is to tell `way` characters of one alphabet apart by 100 steps of SGD on small batches. Each method learns initial weights
from n alphabets and is tested on others; the faster those are learned, the smaller the area under their learning curves.

R seeds run side by side, as replicas (metalib/tree.py): meta-parameters are (R, *shape), and the first seed's tasks come first.
"""
