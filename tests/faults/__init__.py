"""Whatever ends a stage, nothing is lost: `make faults` tries it and fills docs/faults.md."""
