"""What experiments feed to the program: demo files, synthetic models and students, broken files, texts."""
