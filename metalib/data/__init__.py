"""From archives of drawings to batches of tasks."""
