"""The teacher's cache: what it holds, to whom it belongs, how it resumes, what is learnt from it."""
