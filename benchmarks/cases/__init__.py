"""What is measured: one file per op or step."""
