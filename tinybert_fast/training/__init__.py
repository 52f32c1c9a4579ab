"""Training runs: fine-tuning, evaluation, distillation."""
