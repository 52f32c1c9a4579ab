"""What tests and validation share: operands of every op, error budgets, the proofs that an op owes."""
