"""The student: a Hugging Face model, its adapters, its shapes, its clock."""
