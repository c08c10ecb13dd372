"""Conv4 as a function of its weights: conv4 (the network), wide and native (two engines), loss (chooses between them)."""
