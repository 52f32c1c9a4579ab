"""What tests and validation share: operands, error budgets, proofs."""
