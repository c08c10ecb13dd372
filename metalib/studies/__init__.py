"""What the slides' other exhibits measure: computations with a known answer or a question of their own."""
