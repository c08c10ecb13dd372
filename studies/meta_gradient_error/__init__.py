"""How far MAML's and iMAML's meta-gradients are from the exact one, on a regression where it is known in closed form.

Slide "Complexity" (iMAML), the figure's left half and the table.
"""
