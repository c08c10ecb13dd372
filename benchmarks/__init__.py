"""How fast metalib is, beside its alternatives, and how its cost grows. README.md lists the commands."""
