"""One run: what it is made of, what it learns from, its folder, what it says while it goes on."""
