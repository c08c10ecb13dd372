"""How the values of budget `quick` were chosen: lists of tries, and the command that runs them. README.md explains."""
