"""Products in low precision, beside a dense model's own error."""
